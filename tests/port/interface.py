"""Print the interface of an FMS's idefics3 as JSON, to compare the tests' checkout with FMS's own.

.venv-record/bin/python -m tests.port.interface FMS_PATH
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from pathlib import Path
from typing import Any

import torch

from snapshot_tool.candidates.fms.importing import import_fms
from snapshot_tool.families import family_of_config
from snapshot_tool.goldens.manifest import load_manifest
from tests.conftest import CHECKPOINT, GOLDENS, set_folder


def describe(fms_path: Path) -> dict[str, Any]:
    """Return names, signatures, shapes and types of an FMS's idefics3."""
    import_fms(fms_path)
    from fms import models
    from fms.models import idefics3

    config = load_manifest(set_folder(GOLDENS)).checkpoint.config
    fields = family_of_config(config).fms.config(config)
    torch.manual_seed(0)
    model: Any = models.get_model("idefics3", "components", **fields).eval()
    pixels = torch.rand(1, 2, 3, 32, 32)
    span = fields["image_span_len"]
    image = [fields["image_token_id"]] * span
    ids = torch.tensor([[3, *image, 4, *image]])
    with torch.inference_mode():
        with_cache = model(ids, pixel_values=pixels, use_cache=True)
        features = model.vision_tower(pixels[0])
        return {
            "variants": models.list_variants("idefics3"),
            "config": [field.name for field in dataclasses.fields(model.config)],
            "vision config": _names(model.config.vision_config),
            "Idefics3.forward": _parameters(model.forward),
            "Idefics3.generate": _parameters(model.generate),
            "vision_tower.forward": _parameters(model.vision_tower.forward),
            "connector.forward": _parameters(model.connector.forward),
            "load_smolvlm_preprocessor": callable(idefics3.load_smolvlm_preprocessor),
            "weights": {n: list(p.shape) for n, p in sorted(model.named_parameters())},
            "logits": _shape(model(ids, pixel_values=pixels)),
            "logits with cache": [type(with_cache).__name__, _shape(with_cache[0])],
            "logits with mask": _shape(
                model(ids, pixel_values=pixels, pixel_attention_mask=torch.ones(1, 2, 32, 32))
            ),
            "vision": _shape(features[0]),
            "connector": _shape(model.connector(features[0], H=8, W=8)),
            "generated": _shape(model.generate(ids, pixel_values=pixels, max_new_tokens=2)),
            "preprocessed": _preprocessed(idefics3),
        }


def _preprocessed(idefics3: Any) -> dict[str, Any]:
    """Return the shapes that the preprocessor of a checkpoint returns for one image."""
    from PIL import Image

    answer = idefics3.load_smolvlm_preprocessor(str(CHECKPOINT)).preprocess(
        Image.new("RGB", (300, 200))
    )
    names = ("pixel_values", "pixel_attention_mask", "num_patches")
    return {name: _shape(answer[name]) for name in names}


def _names(config: Any) -> list[str]:
    return sorted(field.name for field in dataclasses.fields(config))


def _parameters(function: Any) -> list[str]:
    """Return the names of the parameters, with "=" after those that have a default."""
    return [
        f"{p.name}=" if p.default is not inspect.Parameter.empty else p.name
        for p in inspect.signature(function).parameters.values()
        if p.name not in ("unused", "kwargs", "attn_kwargs")
    ]


def _shape(value: Any) -> Any:
    """Return a tensor's shape and dtype; anything else as it is."""
    return [list(value.shape), str(value.dtype)] if isinstance(value, torch.Tensor) else value


if __name__ == "__main__":
    print(json.dumps(describe(Path(sys.argv[1]))))
