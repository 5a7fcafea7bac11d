"""Whether a golden set on disk is the one that was recorded: sizes, digests, keys. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from snapshot_tool.base.errors import GoldenDamaged, SnapError
from snapshot_tool.base.files import file_size, leaves_root, open_plain
from snapshot_tool.base.phases import Phase
from snapshot_tool.goldens.layout import INPUTS, MANIFEST, ORACLE, OUTPUTS, TAPS, phase_file
from snapshot_tool.goldens.manifest import (
    CaseEntry,
    FileEntry,
    Manifest,
    TensorEntry,
    load_manifest,
)
from snapshot_tool.goldens.packed import PNG
from snapshot_tool.goldens.tensors import describe_file
from snapshot_tool.goldens.transaction import is_being_replaced, recover

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


_TRIES = 20
_REMEDY = "restore it from version control, or record the set again with --update"


def set_file(folder: Path, name: str) -> Path:
    """Return where a file of the manifest lies: inputs are beside the set's folder."""
    return folder.parent / name if name == INPUTS else folder / name


def allowed_files(manifest: Manifest) -> set[str]:
    """Return the file names that a set may have."""
    return {INPUTS, TAPS, ORACLE, OUTPUTS} | {phase_file(phase) for phase in manifest.tolerances}


def find_damage(folder: Path, manifest: Manifest) -> list[str]:
    """Return one line for each file that is not as recorded; none where the set is whole."""
    damage = []
    if INPUTS not in manifest.files:
        damage.append(f"the manifest in {folder} names no {INPUTS}")
    for name, entry in sorted(manifest.files.items()):
        if name not in allowed_files(manifest):
            damage.append(f"the manifest names a file that no golden set has: {name!r}")
            continue
        found = file_damage(set_file(folder, name), entry, inside=folder.parent)
        if found:
            damage.append(found)
    return damage or [f"{folder}: {misfit}" for misfit in find_misfits(manifest)]


def file_damage(path: Path, entry: FileEntry, *, inside: Path) -> str:
    """Return what is wrong with one file, or ""; links that lead out of `inside` are."""
    if leaves_root(path, inside):
        return f"{path} is a link out of the golden set"
    try:
        with open_plain(path) as file:
            size = file_size(file)
    except SnapError as error:
        return error.problem
    if size != entry.size:
        return f"{path} has {size} bytes, recorded were {entry.size}"
    try:
        found = describe_file(path)
    except SnapError as error:
        return f"{path} was altered: {error.problem}"
    return "" if found == entry else f"{path} was altered: {_altered_part(found, entry)}"


def _altered_part(found: FileEntry, entry: FileEntry) -> str:
    keys = [key for key in entry.tensors if found.tensors.get(key) != entry.tensors[key]]
    keys += [key for key in found.tensors if key not in entry.tensors]
    if not keys:
        return "its header differs from the one recorded"
    more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
    return f"tensor {keys[0]} is not the one recorded{more}"


def find_lasting_damage(folder: Path) -> tuple[Manifest, list[str]]:
    """Return the manifest that lies in a folder, and the set's damage.

    A recorder may put another version in place while this one is read: what looks like damage then
    is none. Where the manifest is another file than before, the set is looked at again.
    """
    for _ in range(_TRIES):
        before = _identity(folder)
        try:
            manifest = load_manifest(folder)
            damage = find_damage(folder, manifest)
        except SnapError:
            if _identity(folder) == before and not _was_taken_away(folder, before):
                raise
            continue
        if not damage or _identity(folder) == before:
            return manifest, damage
    raise GoldenDamaged(f"{folder} is replaced again and again", "wait until that has ended")


def _was_taken_away(folder: Path, before: tuple[int, int]) -> bool:
    """Tell whether a recorder had just taken a set away; return when another is in its place."""
    root = folder.parent.parent.parent
    is_away = is_being_replaced(root)
    recover(root)
    return is_away or _identity(folder) != before


def _identity(folder: Path) -> tuple[int, int]:
    """Tell a manifest's file from any other that takes its place."""
    try:
        status = (folder / MANIFEST).lstat()
    except OSError:
        return 0, 0
    return status.st_ino, status.st_ctime_ns


def require_whole(folder: Path, manifest: Manifest) -> None:
    """Raise GoldenDamaged, naming the first damaged file, unless the set is whole."""
    refuse_damage(find_damage(folder, manifest))


def refuse_damage(damage: list[str]) -> None:
    """Raise GoldenDamaged, naming the first damaged file, where there is one."""
    if damage:
        more = f" ({len(damage) - 1} more: snap verify)" if len(damage) > 1 else ""
        raise GoldenDamaged(damage[0] + more, _REMEDY)
