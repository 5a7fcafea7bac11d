"""FMS as the candidate, without transformers: built through its registry from the recorded config.

FMS's own way from a Hugging Face checkpoint, get_model("hf_pretrained", …), imports transformers.
Its registry and adapters do not: this module fills in the configuration that they need.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from snapshot_tool.candidates.fms_import import FmsSource, import_fms
from snapshot_tool.candidates.fms_observe import observe_twins
from snapshot_tool.candidates.fms_weights import require_full_coverage
from snapshot_tool.core.errors import CandidateUnavailable, PhaseUnsupported, SnapError
from snapshot_tool.core.interfaces import CandidateInfo, CandidateRequest, CaseInputs, Observer
from snapshot_tool.families import family_of
from snapshot_tool.families.family import Family

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True, slots=True)
class FmsIdefics3:
    """FMS's idefics3 behind the candidate protocol (interface: fms.models.idefics3)."""

    model: Any
    preprocessor: Any
    source: FmsSource
    family: Family
    device: str
    grid: int

    def info(self) -> CandidateInfo:
        """Say which FMS this is."""
        return CandidateInfo(
            "fms",
            path=str(self.source.path),
            version=self.source.version,
            commit=self.source.commit,
            dirty=self.source.dirty,
        )

    def preprocess(self, images: Sequence[Image.Image]) -> Mapping[str, torch.Tensor]:
        """Return the tiles of all images, (tiles, channels, height, width)."""
        batches = [self.preprocessor.preprocess(image)["pixel_values"] for image in images]
        return {"pixel_values": torch.cat([batch.flatten(0, -4) for batch in batches])}

    def vision(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the encoder's last hidden state, (tiles, patches, width)."""
        features: torch.Tensor = self.model.vision_tower(pixel_values.to(self.device))[0]
        return features

    def connector(self, features: torch.Tensor) -> torch.Tensor:
        """Return the text model's image tokens, (tiles, tokens, width)."""
        tokens: torch.Tensor = self.model.connector(
            features.to(self.device), H=self.grid, W=self.grid
        )
        return tokens

    def forward(self, inputs: CaseInputs) -> torch.Tensor:
        """Return the logits of every position, (1, length, vocabulary)."""
        logits: torch.Tensor = self.model(**self._arguments(inputs))["logits"]
        return logits

    def generate(
        self, inputs: CaseInputs, *, max_new_tokens: int, eos_token_ids: Sequence[int]
    ) -> torch.Tensor:
        """Return the greedy new tokens, the end token included."""
        ids = self.model.generate(
            **self._arguments(inputs),
            max_new_tokens=max_new_tokens,
            eos_token_id=eos_token_ids[0] if len(eos_token_ids) == 1 else None,
        )
        new: torch.Tensor = ids[0, inputs.input_ids.shape[1] :]
        # FMS's generate knows one end token: with several it runs on, and is cut here.
        return new if len(eos_token_ids) <= 1 else _up_to_end(new, eos_token_ids)

    def forward_batch(self, rows: Sequence[CaseInputs]) -> torch.Tensor:
        """Return the logits of prompts padded to one length, (rows, length, vocabulary)."""
        return self.forward(_batch(rows))

    def forward_in_parts(self, parts: Sequence[CaseInputs]) -> torch.Tensor:
        """Return the logits of all parts of a prompt, each run on the cache of those before it."""
        logits, cache = [], None
        for part in parts:
            answer = self.model(
                **self._arguments(part), past_key_value_states=cache, use_cache=True
            )
            if "past_key_value_states" not in answer:
                raise PhaseUnsupported("this FMS's forward gives out no key-value cache")
            cache = answer["past_key_value_states"]
            logits.append(answer["logits"])
        return torch.cat(logits, dim=1)

    def generate_batch(
        self, rows: Sequence[CaseInputs], *, max_new_tokens: int, eos_token_ids: Sequence[int]
    ) -> list[torch.Tensor]:
        """Return the greedy new tokens of each prompt, its own end token included."""
        ids = self.model.generate(
            **self._arguments(_batch(rows)),
            max_new_tokens=max_new_tokens,
            eos_token_id=eos_token_ids[0] if len(eos_token_ids) == 1 else None,
        )
        return [_up_to_end(new, eos_token_ids) for new in ids[:, rows[0].input_ids.shape[1] :]]

    def observe_forward(self, inputs: CaseInputs, observe: Observer) -> Mapping[str, str]:
        """Run forward and show the modules; return FMS's name of each, by Hugging Face's."""
        text = self.model.config.text_config
        head_dim = text.emb_dim // text.nheads
        with observe_twins(self.model, self.family.fms_twins, observe, head_dim=head_dim) as names:
            self.forward(inputs)
        return names

    def _arguments(self, inputs: CaseInputs) -> dict[str, torch.Tensor | None]:
        pixels = inputs.pixel_values
        return {
            "input_ids": inputs.input_ids.to(self.device),
            "attention_mask": inputs.attention_mask.to(self.device),
            "pixel_values": None if pixels is None else pixels.unsqueeze(0).to(self.device),
        }


def _batch(rows: Sequence[CaseInputs]) -> CaseInputs:
    """Return prompts of one length as one batch; the tiles of all rows follow each other."""
    pixels = [row.pixel_values for row in rows if row.pixel_values is not None]
    return CaseInputs(
        torch.cat([row.input_ids for row in rows]),
        torch.cat([row.attention_mask for row in rows]),
        torch.cat(pixels) if pixels else None,
    )


def _up_to_end(new: torch.Tensor, eos_token_ids: Sequence[int]) -> torch.Tensor:
    """Return new tokens (new,) up to the first end token, included."""
    ends = torch.isin(new, torch.tensor(list(eos_token_ids), device=new.device)).nonzero()
    return new[: int(ends[0]) + 1] if len(ends) else new


def load_fms_candidate(request: CandidateRequest, *, fms_path: Path | None) -> FmsIdefics3:
    """Build FMS's model of a checkpoint; raise CandidateUnavailable where it cannot."""
    source = import_fms(fms_path)
    family = family_of(str(request.config.get("model_type")))
    module = _family_module(family, source)
    try:
        fields = _named_as_fms_does(family, family.fms_config(request.config), module)
        model = _build_model(family, fields, request)
        preprocessor = module.load_smolvlm_preprocessor(str(request.checkpoint))
    except SnapError:
        raise
    except Exception as error:
        raise CandidateUnavailable(
            f"FMS at {source.path} cannot load {request.checkpoint}: "
            f"{type(error).__name__}: {_first_line(error)}"
        ) from error
    require_full_coverage(
        model,
        request.checkpoint,
        architecture=family.fms_architecture,
        not_weights=family.not_weights,
    )
    vision = request.config["vision_config"]
    grid = vision["image_size"] // vision["patch_size"]
    return FmsIdefics3(model.eval(), preprocessor, source, family, request.device, grid)


def _family_module(family: Family, source: FmsSource) -> Any:
    """Return FMS's module of the family; raise where this FMS does not have it."""
    from fms import models

    known = models.list_models()
    if family.fms_architecture not in known:
        raise CandidateUnavailable(
            f"FMS at {source.path} has no {family.fms_architecture} (it has: {', '.join(known)})",
            "pass a checkout of a branch that has it: --fms-path DIR",
        )
    return importlib.import_module(f"fms.models.{family.fms_architecture}")


def _build_model(family: Family, fields: dict[str, Any], request: CandidateRequest) -> Any:
    from fms import models

    architecture = family.fms_architecture
    variant = models.list_variants(architecture)[0]
    model = models.get_model(
        architecture,
        variant,
        model_path=str(request.checkpoint),
        source="hf",
        device_type=request.device,
        data_type=getattr(torch, request.dtype),
        **fields,
    )
    _require_taken(fields, model.config, architecture)
    return model


def _named_as_fms_does(family: Family, fields: dict[str, Any], module: Any) -> dict[str, Any]:
    """Rename the fields that this FMS calls otherwise."""
    known = {field.name for field in dataclasses.fields(getattr(module, family.fms_config_class))}
    renamed = {}
    for name, value in fields.items():
        names = (name, *family.fms_aliases.get(name, ()))
        renamed[next((n for n in names if n in known), name)] = value
    return renamed


def _require_taken(fields: Mapping[str, Any], config: Any, path: str) -> None:
    """Raise unless FMS's configuration holds every field: unknown ones it ignores in silence."""
    for name, value in fields.items():
        if not hasattr(config, name):
            raise CandidateUnavailable(
                f"FMS's {path} configuration has no field {name}",
                "this branch of FMS is not supported yet",
            )
        actual = getattr(config, name)
        if isinstance(value, dict) and name.endswith("_config"):
            _require_taken(value, actual, f"{path}.{name}")
        elif actual != value:
            raise CandidateUnavailable(
                f"FMS's {path} configuration took {name}={actual}, not {value} from the checkpoint"
            )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no message").splitlines()[0]
