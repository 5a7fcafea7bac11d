"""What the tensors of a golden set must look like, by the manifest alone: no file is opened here.

Digests say that a file is the one that its manifest describes. A stranger writes both: this sees
that every case has the tensors that reading it takes, in the dtype and with the dimensions of
`docs/golden-format.md`. Tensors that are not known here are nobody's business.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from snapshot_tool.base.phases import Phase
from snapshot_tool.goldens.layout import INPUTS, TAPS, phase_file
from snapshot_tool.goldens.manifest import CaseEntry, Manifest, TensorEntry
from snapshot_tool.goldens.packed import PNG

_FLOATS = ("F32", "F64", "BF16", "F16")
_WORDS = ("I64",)

# Large tensors of a compact set, and what its connector is asked.
_COMPACT: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
    r".+\.shape": (_WORDS, (1,)),
    r".+\.(sample|rows)": (_FLOATS, (2,)),
    r".+\.(moments|sums)": (("F64",), (2,)),
}

# file -> pattern of a tensor's name -> dtypes, numbers of dimensions
_LAYOUT: dict[str, dict[str, tuple[tuple[str, ...], tuple[int, ...]]]] = {
    INPUTS: {
        r"input_ids|attention_mask|token_type_ids": (_WORDS, (2,)),
        r"pixel_values": (_FLOATS, (3, 4, 5)),
        r"pixel_attention_mask": (("BOOL",), (3,)),
        r".+\.png": (("U8",), (1,)),
        r".+\.shape": (_WORDS, (1,)),
        r".+\.levels": ((*_FLOATS, "BOOL"), (2,)),
        r".+\.cuts": (_WORDS, (2,)),
        r".+\.sha256": (("U8",), (1,)),
        r"image_sizes": (_WORDS, (2,)),
        r"image\.\d+\.pixels": (("U8",), (3,)),
        r"image\.\d+\.palette": (("U8",), (1,)),
    },
    phase_file(Phase.VISION): _COMPACT,
    phase_file(Phase.CONNECTOR): _COMPACT,
    phase_file(Phase.FORWARD): {
        **_COMPACT,
        r"logits|position_logsumexp": (_FLOATS, (1,)),
        r"position_topk_values|position_sample": (_FLOATS, (2,)),
        r"position_topk_ids": (_WORDS, (2,)),
        r"position_sample_ids": (_WORDS, (1,)),
    },
    phase_file(Phase.GENERATE): {
        r"token_ids": (_WORDS, (1,)),
        r"step_topk_values": (_FLOATS, (2,)),
        r"step_topk_ids": (_WORDS, (2,)),
    },
    TAPS: {
        r"modules": (_WORDS, (1,)),
        r"(input|output)_shapes": (_WORDS, (2,)),
        r"(input|output)_(moments|projection|sample)": (_FLOATS, (2,)),
    },
}
_NEEDED = {
    phase_file(Phase.GENERATE): ("token_ids",),
    TAPS: ("modules", *(f"{side}_{part}" for side in ("input", "output")
                        for part in ("shapes", "moments", "projection", "sample"))),
}  # fmt: skip


def find_misfits(manifest: Manifest) -> list[str]:
    """Return one line for each tensor that is missing or not of its kind."""
    return [
        *_misshapen(manifest),
        *(m for case in manifest.cases for m in _missing(manifest, case)),
    ]


def _misshapen(manifest: Manifest) -> Iterator[str]:
    for file, kinds in _LAYOUT.items():
        if file not in manifest.files:
            continue
        for key, entry in manifest.files[file].tensors.items():
            name = key.partition("/")[2]
            for pattern, (dtypes, dimensions) in kinds.items():
                if re.fullmatch(pattern, name) and not _fits(entry, dtypes, dimensions):
                    yield f"{file} has {key} as {entry.dtype} {list(entry.shape)}"


def _fits(entry: TensorEntry, dtypes: tuple[str, ...], dimensions: tuple[int, ...]) -> bool:
    return entry.dtype in dtypes and len(entry.shape) in dimensions


def _missing(manifest: Manifest, case: CaseEntry) -> Iterator[str]:
    inputs = manifest.files[INPUTS].tensors
    ids, mask = (inputs.get(f"{case.name}/{name}") for name in ("input_ids", "attention_mask"))
    # A vision encoder by itself takes no tokens.
    least = 0 if case.images and Phase.FORWARD not in case.phases else 1
    if ids is None or mask is None:
        yield f"{INPUTS} has no ids or no mask of {case.name}"
    elif ids.shape != mask.shape or ids.shape[0] != 1 or ids.shape[1] < least:
        yield f"{case.name} has ids {list(ids.shape)} and a mask {list(mask.shape)}"
    for index in range(case.images):
        pixels = f"{case.name}/image.{index}.pixels"
        if pixels not in inputs and pixels + PNG not in inputs:
            yield f"{INPUTS} has no pixels of image {index} of {case.name}"
            break
    for file, names in _NEEDED.items():
        tensors = manifest.files[file].tensors if file in manifest.files else {}
        there = [name for name in names if f"{case.name}/{name}" in tensors]
        if there and len(there) < len(names):
            lacking = next(name for name in names if name not in there)
            yield f"{file} has no {case.name}/{lacking}"
