"""A mutant: one fault in the FMS checkout, an edit of its source or a change of a weight."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

# Places that are not modules of the reference.
GENERATION = "the generation loop"

# Instead of a phase: only derived questions show it, or it cannot be loaded.
DERIVED = "derived"
LOADING = "loading"

ALL_WEIGHTS = "all weights"
_SWAPPED = "swapped with "
_SET = "set to "
_QKV = ("query", "key", "value")
_GATE = ("wg", "w1")


def _noise(weight: torch.Tensor) -> torch.Tensor:
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    return weight + 1e-4 * float(weight.std()) * noise


def _clipped(weight: torch.Tensor) -> torch.Tensor:
    return weight.clamp(-2.5 * float(weight.std()), 2.5 * float(weight.std()))


def _rows_swapped(weight: torch.Tensor) -> torch.Tensor:
    return weight.index_copy(0, torch.tensor([100, 200]), weight[[200, 100]])


def _row_rounded(weight: torch.Tensor) -> torch.Tensor:
    weight[5] = weight[5].bfloat16()
    return weight


def _add_to(*place: int, amount: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def add(weight: torch.Tensor) -> torch.Tensor:
        weight[place] += amount
        return weight

    return add


def _times(factor: float, rows: slice, columns: slice = slice(None)) -> Callable[..., torch.Tensor]:
    def multiply(weight: torch.Tensor) -> torch.Tensor:
        weight[rows, columns] *= factor
        return weight

    return multiply


# What a corpus file calls a change of a weight; each may change the clone that it is given.
OPERATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "times 1.001": lambda weight: weight * 1.001,
    "times 1.0001": lambda weight: weight * 1.0001,
    "negated": torch.neg,
    "zeroed": torch.zeros_like,
    "transposed": lambda weight: weight.transpose(-1, -2),
    "rounded to bfloat16": lambda weight: weight.bfloat16().to(weight.dtype),
    "row 5 rounded to bfloat16": _row_rounded,
    "shifted by one row": lambda weight: weight.roll(1, 0),
    "rows 100 and 200 swapped": _rows_swapped,
    "row 0 doubled": _times(2, slice(1)),
    "first head zeroed": _times(0, slice(None), slice(16)),
    "last ten rows zeroed": _times(0, slice(-10, None)),
    "[3, 5] + 0.05": _add_to(3, 5, amount=0.05),
    "last row + 0.01": _add_to(-1, amount=0.01),
    "[7, 7] is NaN": _add_to(7, 7, amount=torch.nan),
    "noise": _noise,
    "clipped": _clipped,
}


@dataclass(frozen=True, slots=True)
class Edit:
    """Replace `old`, which the file of the checkout has exactly once, by `new`."""

    file: str
    old: str
    new: str


@dataclass(frozen=True, slots=True)
class Change:
    """Change a weight of the loaded model, or a number that one of its modules has.

    Args:
        weight: FMS's name of it, as if nothing were fused, or ALL_WEIGHTS.
        how: one of OPERATIONS, "swapped with" and another weight, or "set to" and a number.
    """

    weight: str
    how: str

    def apply(self, model: torch.nn.Module) -> None:
        """Change the model's weight in place."""
        if self.how.startswith(_SET):
            module, _, name = self.weight.rpartition(".")
            setattr(model.get_submodule(module), name, float(self.how.removeprefix(_SET)))
            return
        with torch.no_grad():
            if self.how.startswith(_SWAPPED):
                one = weight_of(model, self.weight)
                other = weight_of(model, self.how.removeprefix(_SWAPPED))
                before = one.clone()
                one.copy_(other)
                other.copy_(before)
                return
            targets = (
                list(model.parameters())
                if self.weight == ALL_WEIGHTS
                else [weight_of(model, self.weight)]
            )
            for target in targets:
                target.copy_(OPERATIONS[self.how](target.clone()))


@dataclass(frozen=True, slots=True)
class Mutant:
    """One fault, with what is expected of a check: written down before the mutant was run.

    Args:
        name: its name in docs/detection.md.
        what: the fault in a few words.
        phase: the first phase that shows it, DERIVED or LOADING.
        places: the reference's modules that may be named, or words for other code.
        fault: how it is planted.
    """

    name: str
    what: str
    phase: str
    places: tuple[str, ...]
    fault: Edit | Change


def weight_of(model: torch.nn.Module, name: str) -> torch.Tensor:
    """Return a weight, or a view of its part of a fused one."""
    module_name, _, kind = name.rpartition(".")
    parent_name, _, part = module_name.rpartition(".")
    parent = model.get_submodule(parent_name)
    if part in _QKV and hasattr(parent, "qkv_fused"):
        fused = getattr(parent.qkv_fused, kind).detach()
        splits: list[int] = getattr(parent, "splits")  # noqa: B009 - torch types it as a module
        return torch.split(fused, splits)[_QKV.index(part)]
    if part in _GATE and hasattr(parent, "wg1_fused"):
        fused = getattr(parent.wg1_fused, kind).detach()
        return torch.chunk(fused, 2)[_GATE.index(part)]
    whole: torch.Tensor = getattr(model.get_submodule(module_name), kind).detach()
    return whole


def plant(edit: Edit, *, checkout: Path, out: Path) -> None:
    """Copy a checkout to `out` and edit one file of the copy; git sees it as a change.

    Compiled files come along and stay valid, which makes the import several times faster.
    """
    shutil.copytree(checkout, out)
    edit_file(edit, root=out)


def plant_linked(edit: Edit | None, *, checkout: Path, out: Path) -> None:
    """Lay out a checkout's package at `out` without git, in hard links except the edited file."""
    shutil.copytree(checkout / "fms", out / "fms", copy_function=os.link)
    if edit is not None:
        edit_file(edit, root=out)


def edit_file(edit: Edit, *, root: Path) -> None:
    """Replace the text; raise ValueError unless the file has it exactly once."""
    path = root / edit.file
    source = path.read_text(encoding="utf-8")
    if source.count(edit.old) != 1:
        raise ValueError(f"{edit.file} has {source.count(edit.old)} times, not once: {edit.old!r}")
    path.unlink()  # it may be a link to the original
    path.write_text(source.replace(edit.old, edit.new), encoding="utf-8")
    for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
        compiled.unlink()
