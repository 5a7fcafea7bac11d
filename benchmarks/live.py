"""The rival: FMS beside live Hugging Face in one process, phase by phase, as the parity suite runs.

usage: python benchmarks/live.py CHECKPOINT FMS_CHECKOUT

One image goes through all phases, two images through forward and generate. It runs where both
libraries are: transformers 4.57.6 with ibm-fms 1.13.1. That release numbers the vision encoder's
patches otherwise than FMS (README, "Drift"), so the figures it compares differ; its work does not.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch

from snapshot_tool.base.recipes import FIXED_CASES, NamedRecipe
from snapshot_tool.goldens.images import render

NEW_TOKENS = 20


class Live:
    """Both implementations of one checkpoint."""

    def __init__(self, checkpoint: Path) -> None:
        from fms.models import get_model
        from fms.models.idefics3 import load_smolvlm_preprocessor
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.processor = AutoProcessor.from_pretrained(checkpoint)
        hf = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
        self.hf = hf.eval()
        self.fms = get_model(
            "hf_pretrained", variant=str(checkpoint), device_type="cpu", data_type=torch.float32
        ).eval()
        self.preprocessor = load_smolvlm_preprocessor(str(checkpoint))

    def compare(self, case: NamedRecipe, *, parts: bool) -> None:
        """Run a case end to end on both sides and, with `parts`, through each phase alone."""
        images = [render(image) for image in case.recipe.images]
        batch = self.processor(text=case.recipe.prompt, images=images, return_tensors="pt")
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
        if parts:
            self._compare_parts(images, inputs["pixel_values"][0])
        logits = self.hf(**inputs).logits[0, -1]
        report("forward", logits, self.fms(**inputs)[0, -1])
        ids = self.hf.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        end = self.hf.generation_config.eos_token_id
        own = self.fms.generate(**inputs, max_new_tokens=NEW_TOKENS, eos_token_id=end)
        print("generate", own.tolist() == ids.tolist())

    def _compare_parts(self, images: list[Any], pixels: torch.Tensor) -> None:
        tiles = [self.preprocessor.preprocess(image)["pixel_values"] for image in images]
        report("preprocessing", pixels, torch.cat([tile.flatten(0, -4) for tile in tiles]))
        features = self.hf.model.vision_model(pixels).last_hidden_state
        report("vision", features, self.fms.vision_tower(pixels)[0])
        # The suite's connector test gets its features by itself.
        features = self.hf.model.vision_model(pixels).last_hidden_state
        grid = math.isqrt(features.shape[1])
        connected = self.fms.connector(features, H=grid, W=grid)
        report("connector", self.hf.model.connector(features), connected)


def report(phase: str, expected: torch.Tensor, actual: torch.Tensor) -> None:
    """Print what the suite asserts."""
    difference = float((expected - actual).abs().max())
    print(phase, torch.allclose(actual, expected, atol=5e-5, rtol=5e-5), f"{difference:.2g}")


def main() -> None:
    """Run both fixed cases."""
    checkpoint, checkout = sys.argv[1:]
    sys.path.insert(0, checkout)
    one, two = FIXED_CASES
    with torch.inference_mode():
        live = Live(Path(checkpoint))
        live.compare(one, parts=True)
        live.compare(two, parts=False)


if __name__ == "__main__":
    main()
