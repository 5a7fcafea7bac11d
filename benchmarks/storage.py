"""What a case takes on disk at the true shapes of SmolVLM-256M, in both kinds of golden set.

usage: python -m benchmarks.storage     (needs build/bench/true-shape and the record environment)
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.check import CHECKOUT
from benchmarks.figures import OUT, ROOT, Row, publish, run_process
from snapshot_tool.core.recipes import ImageRecipe
from snapshot_tool.images import render
from snapshot_tool.store.layout import find_set_folders
from snapshot_tool.store.manifest import Manifest, load_manifest
from snapshot_tool.store.packed import pack_inputs
from snapshot_tool.store.tensors import read_header
from snapshot_tool.store.verify import set_file

CHECKPOINT = OUT / "true-shape"
SETS = {"full": OUT / "goldens", "compact": OUT / "compact"}
RECORD = ROOT / ".venv-record" / "bin" / "snap"
TARGET = 3.0  # MB


def recorded(storage: str) -> tuple[Path, Manifest]:
    """Return the set of the two fixed cases, recorded now where it is not there yet."""
    goldens = SETS[storage]
    if not find_set_folders(goldens):
        options = ("--variants", "0", "--storage", storage, "--goldens", str(goldens))
        run_process([str(RECORD), "record", "--checkpoint", str(CHECKPOINT), *options])
    (folder,) = find_set_folders(goldens)
    return folder, load_manifest(folder)


def megabytes(storage: str) -> dict[str, float]:
    """Return what each case takes, its share of the manifest included."""
    folder, manifest = recorded(storage)
    cases = {case.name: 0 for case in manifest.cases}
    for file in manifest.files:
        for key, span in read_header(set_file(folder, file)).items():
            cases[key.partition("/")[0]] += span.end - span.start
    share = (folder / "manifest.json").stat().st_size / len(cases)
    return {case: (size + share) / 1e6 for case, size in cases.items()}


def megabytes_of_noise() -> float:
    """Return what the tiles of one 512 by 512 image of noise take as PNG, their worst input.

    By the checkout's image processor, whose tiles are Hugging Face's bit for bit.
    """
    sys.path.insert(0, str(ROOT / CHECKOUT))
    from fms.models.idefics3 import load_smolvlm_preprocessor

    image = render(ImageRecipe("noise", 512, 512, seed=1))
    tiles = load_smolvlm_preprocessor(str(CHECKPOINT)).preprocess(image)["pixel_values"]
    packed = pack_inputs({"pixel_values": tiles.flatten(0, -4)})
    return sum(tensor.nbytes for tensor in packed.values()) / 1e6


def main() -> None:
    """Measure, print, keep the figures."""
    rows = []
    for case, size in megabytes("compact").items():
        what = f"{case}, compact, MB"
        rows.append(Row(what, size, f"at most {TARGET:g}", met=size <= TARGET))
    rows += [Row(f"{case}, full, MB", size) for case, size in megabytes("full").items()]
    noise = megabytes_of_noise()
    what = "the tiles of one image of noise, compact, MB"
    rows.append(Row(what, noise, f"at most {TARGET:g}", met=noise <= TARGET))
    publish(
        "storage",
        "A case on disk, true shape",
        rows,
        note="The fixed cases' images are gradients. Noise is what PNG makes least of.",
    )


if __name__ == "__main__":
    main()
