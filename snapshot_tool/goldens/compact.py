"""Compact golden sets: how large answers are laid out, and what feeds the connector.

Of `<tensor>` are kept `<tensor>.shape`, `.sample`, `.moments` and `.sums` (see core/compact.py).
The connector cannot be fed with features that are not kept. It is asked about others of the same
shape: each patch is one of 64 that the reference's encoder made of this case, at a seeded place.
Kept are these, `input.rows`, and `input.shape`; the reference's connector answered the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from snapshot_tool.base.errors import GoldenDamaged
from snapshot_tool.base.phases import Phase
from snapshot_tool.goldens.golden import Golden
from snapshot_tool.goldens.layout import phase_file
from snapshot_tool.numerics.compact import LARGE, CompactTensor, compact

if TYPE_CHECKING:
    import torch

QUESTION_ROWS = 64
QUESTION = "input"
_MAX_QUESTION = 2**28  # elements that a file of a few bytes may ask for
_MAX_SIDE = 2**20
_PARTS = ("shape", "sample", "moments", "sums")

Tensors = dict[str, "torch.Tensor"]


def is_large(tensor: torch.Tensor) -> bool:
    """Tell whether a compact golden set keeps a tensor in its compact form."""
    return (
        tensor.is_floating_point()
        and tensor.numel() > LARGE
        and tensor.dim() > 1
        and bool(tensor.isfinite().all())
    )


def narrowed(tensor: torch.Tensor) -> torch.Tensor:
    """Return many integers in 16 bits where these hold them: the position of every patch, say."""
    import torch

    if tensor.dtype is not torch.int64 or tensor.numel() <= LARGE:
        return tensor
    narrow = tensor.to(torch.int16)
    return narrow if torch.equal(narrow.to(tensor.dtype), tensor) else tensor


def compact_tensors(name: str, tensor: torch.Tensor, *, seed: int) -> Tensors:
    """Return what is kept of a large tensor."""
    import torch

    kept = compact(tensor, seed=seed)
    parts = (torch.tensor(kept.shape), kept.sample, kept.moments, kept.sums)
    return {f"{name}.{part}": value for part, value in zip(_PARTS, parts, strict=True)}


def recorded(golden: Golden, case: str, phase: Phase, name: str) -> torch.Tensor | CompactTensor:
    """Return a recorded answer, whole if it is kept whole."""
    if f"{name}.{_PARTS[0]}" not in golden.tensor_names(case, phase):
        return golden.tensor(case, phase, name)
    shape, sample, moments, sums = (golden.tensor(case, phase, f"{name}.{p}") for p in _PARTS)
    sides = tuple(shape.tolist())
    kept = CompactTensor(
        sides, golden.manifest.seed, sample, moments, sums, tuple(range(len(sample)))
    )
    if not all(0 < side < _MAX_SIDE for side in sides) or not kept.is_consistent:
        raise GoldenDamaged(
            f"{golden.folder / phase_file(phase)}: {name} of {case} is no compact tensor",
            "record the set again",
        )
    return kept


def recorded_shape(golden: Golden, case: str, phase: Phase, name: str) -> tuple[int, ...]:
    """Return the shape of a recorded answer; GoldenNotFound without one."""
    if name in golden.tensor_names(case, phase):
        return golden.shape(case, phase, name)
    return tuple(recorded(golden, case, phase, name).shape)


def question_tensors(features: torch.Tensor, *, seed: int) -> Tensors:
    """Return what is kept of the connector's question about large features (…, width)."""
    import torch

    rows = features.reshape(-1, features.shape[-1])
    places = _draw(len(rows), QUESTION_ROWS, seed=seed)
    shape = torch.tensor(features.shape)
    return {f"{QUESTION}.rows": rows[places], f"{QUESTION}.shape": shape}


def make_question(kept: Mapping[str, torch.Tensor], *, seed: int) -> torch.Tensor:
    """Return the features that `question_tensors` describes; ValueError where it describes none."""
    rows, shape = kept[f"{QUESTION}.rows"], tuple(kept[f"{QUESTION}.shape"].tolist())
    fits = len(shape) > 1 and all(0 < side <= _MAX_QUESTION for side in shape)
    if (
        not fits
        or math.prod(shape) > _MAX_QUESTION
        or rows.shape[1:] != shape[-1:]
        or not len(rows)
    ):
        raise ValueError(f"no features of {shape} can be made of {tuple(rows.shape)}")
    return rows[_draw(len(rows), math.prod(shape[:-1]), seed=seed)].reshape(shape)


def connector_input(golden: Golden, case: str, vision: str) -> torch.Tensor | None:
    """Return what the connector's recorded answer is the answer to; None where it is not kept.

    vision: the name of the encoder's output, which it is in a set that keeps that whole.
    """
    names = golden.tensor_names(case, Phase.CONNECTOR)
    question = [name for name in names if name.partition(".")[0] == QUESTION]
    if question:
        kept = {name: golden.tensor(case, Phase.CONNECTOR, name) for name in question}
        try:
            return make_question(kept, seed=golden.manifest.seed)
        except (ValueError, KeyError) as error:
            raise GoldenDamaged(
                f"{golden.folder / phase_file(Phase.CONNECTOR)}: {case}: {error}"
            ) from error
    if vision in golden.tensor_names(case, Phase.VISION):
        return golden.tensor(case, Phase.VISION, vision)
    return None


def _draw(below: int, count: int, *, seed: int) -> torch.Tensor:
    """Return (count,) int64 numbers, the same for the same seed."""
    import numpy as np
    import torch

    drawn = np.random.RandomState([seed, below, count]).randint(0, below, size=count)
    return torch.from_numpy(drawn.astype(np.int64))
