"""Verify a golden set on disk against its manifest: sizes, digests, tensors. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from snapshot_tool.base.errors import GoldenDamaged, SnapError
from snapshot_tool.base.files import leaves_root
from snapshot_tool.base.protocol import Phase
from snapshot_tool.goldens.layout import (
    INPUTS,
    MODULE_INPUTS,
    ORACLE,
    OUTPUTS,
    PNG,
    PROBES,
    TAPS,
    phase_file,
)
from snapshot_tool.goldens.manifest import CaseEntry, FileEntry, Manifest, load_manifest
from snapshot_tool.goldens.tensors import TensorFile, open_tensors
from snapshot_tool.goldens.transaction import read_undisturbed

_FLOATS = ("F32", "F64", "BF16", "F16")
_WORDS = ("I64",)

# Large tensors of a compact set, and the input of its connector.
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
        r"step_logsumexp": (_FLOATS, (1,)),
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


def _misfits(manifest: Manifest) -> list[str]:
    """Return one line for each tensor that is missing or not of its kind."""
    misfits = []
    for file, kinds in _LAYOUT.items():
        tensors = manifest.files[file].tensors if file in manifest.files else {}
        for key, entry in tensors.items():
            name = key.partition("/")[2]
            for pattern, (dtypes, dimensions) in kinds.items():
                fits = entry.dtype in dtypes and len(entry.shape) in dimensions
                if not fits and re.fullmatch(pattern, name):
                    misfits.append(f"{file} has {key} as {entry.dtype} {list(entry.shape)}")
            if name == "pixel_values.cuts":
                misfits.append(f"{file} has {key}, no longer supported: record the set again")
    return misfits + [misfit for case in manifest.cases for misfit in _missing(manifest, case)]


def _missing(manifest: Manifest, case: CaseEntry) -> Iterator[str]:
    inputs = manifest.files[INPUTS].tensors
    ids, mask = (inputs.get(f"{case.name}/{name}") for name in ("input_ids", "attention_mask"))
    # A vision encoder alone takes no tokens.
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


_REMEDY = "restore it from version control, or record the set again with --update"


def set_file(folder: Path, name: str) -> Path:
    """Return the path of a file of the manifest: inputs are beside the set's folder."""
    return folder.parent / name if name == INPUTS else folder / name


def open_set(
    folder: Path, manifest: Manifest | None = None
) -> tuple[Manifest, dict[str, TensorFile], list[str]]:
    """Open a set; return its manifest, its files and its damage, as `open_files` does.

    A recorder may replace the set meanwhile: then it is read again. Nothing is written.

    manifest: the set's, if it was read already.
    """
    known = [] if manifest is None else [manifest]

    def read() -> tuple[Manifest, dict[str, TensorFile], list[str]]:
        manifest = known.pop() if known else load_manifest(folder)
        return manifest, *open_files(folder, manifest)

    return read_undisturbed(folder.parent, read, is_whole=lambda found: not found[2])


def verify_set(folder: Path, manifest: Manifest | None = None) -> tuple[Manifest, list[str]]:
    """Return a set's manifest and its damage; see `open_set`."""
    manifest, files, damage = open_set(folder, manifest)
    for file in files.values():
        file.file.close()
    return manifest, damage


def find_damage(folder: Path, manifest: Manifest) -> list[str]:
    """Return one line for each file that is not as recorded; none if the set is whole."""
    files, damage = open_files(folder, manifest)
    for file in files.values():
        file.file.close()
    return damage


def open_files(folder: Path, manifest: Manifest) -> tuple[dict[str, TensorFile], list[str]]:
    """Open a set's files and compare every byte with the manifest; return them and the damage.

    All are opened before the first is read: a recorder that replaces the set meanwhile changes
    nothing about the open ones.
    """
    extras = {INPUTS, TAPS, ORACLE, OUTPUTS, MODULE_INPUTS, PROBES}
    known = extras | {*map(phase_file, manifest.tolerances)}
    damage = [] if INPUTS in manifest.files else [f"the manifest in {folder} names no {INPUTS}"]
    files = {}
    for name in sorted(manifest.files):
        path = set_file(folder, name)
        if name not in known:
            damage.append(f"the manifest names a file that no golden set has: {name!r}")
        elif leaves_root(path, folder.parent):
            damage.append(f"{path} is a link out of the golden set")
        else:
            try:
                files[name] = open_tensors(path, size=manifest.files[name].size)
            except SnapError as error:
                damage.append(error.problem)
    for name, file in files.items():
        try:
            difference = _difference(file.describe(), manifest.files[name])
        except SnapError as error:
            difference = error.problem
        if difference:
            damage.append(f"{file.path} was altered: {difference}")
    return files, damage or [f"{folder}: {misfit}" for misfit in _misfits(manifest)]


def _difference(found: FileEntry, entry: FileEntry) -> str:
    """Return how a file differs from the one recorded, or ""."""
    if found == entry:
        return ""
    keys = [key for key in entry.tensors if found.tensors.get(key) != entry.tensors[key]]
    keys += [key for key in found.tensors if key not in entry.tensors]
    if not keys:
        return "its header differs from the one recorded"
    more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
    return f"tensor {keys[0]} is not the one recorded{more}"


def refuse_damage(damage: list[str]) -> None:
    """Raise GoldenDamaged, naming the first damaged file, if there is one."""
    if damage:
        more = f" ({len(damage) - 1} more: snap verify)" if len(damage) > 1 else ""
        raise GoldenDamaged(damage[0] + more, _REMEDY)
