"""What the inputs of one image of noise take in a compact set, by Hugging Face's own processor.

usage: .venv-record/bin/python -m benchmarks.noise CHECKPOINT OUT.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from snapshot_tool.base.images import render, to_arrays
from snapshot_tool.base.recipes import CaseRecipe, ImageRecipe
from snapshot_tool.families import family_of
from snapshot_tool.goldens.packed import pack_inputs
from snapshot_tool.reference.preparation import Preparation


def main() -> None:
    """Prepare and pack the image, and write the bytes of its tensors by name."""
    import torch

    checkpoint, out = map(Path, sys.argv[1:])
    family = family_of("idefics3")
    preparation = Preparation(family, Preparation.load(family, checkpoint), pad_token_id=0)
    drawn = ImageRecipe("noise", 512, 512, seed=1)
    image = render(drawn)
    recipe = CaseRecipe("<image>", (drawn,))
    inputs = preparation.encode(recipe, recipe.prompt, [image])
    cuts = preparation.image_cuts([image], preparation.image_grids([image]))
    if inputs.pixel_values is None:
        raise SystemExit("the processor made no pixel values")
    pixels = torch.from_numpy(to_arrays(image)["pixels"].copy())
    tensors = {"image.0.pixels": pixels, "pixel_values": inputs.pixel_values}
    packed = {way: pack_inputs(tensors, kept) for way, kept in (("cuts", cuts), ("png", None))}
    sizes = {way: sum(t.nbytes for t in kept.values()) for way, kept in packed.items()}
    out.write_text(json.dumps(sizes), encoding="utf-8")


if __name__ == "__main__":
    main()
