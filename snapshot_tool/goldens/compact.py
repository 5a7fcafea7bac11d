"""Compact golden sets: how large outputs are laid out, and the input of the connector.

Of `<tensor>` are kept `<tensor>.shape`, `.sample`, `.moments` and `.sums` (numerics/compact.py).
The vision features are not kept, so the connector gets others of the same shape: each patch is one
of 64 that the reference's encoder made of this case, at a seeded place. Kept are these,
`input.rows`, and `input.shape`; the reference's connector had the same input.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch

from snapshot_tool.base.errors import GoldenDamaged
from snapshot_tool.base.protocol import Phase
from snapshot_tool.goldens.golden import Golden
from snapshot_tool.goldens.layout import phase_file
from snapshot_tool.numerics.compact import LARGE, CompactTensor, compact

QUESTION_ROWS = 64
QUESTION = "input"
_MAX_QUESTION = 2**28  # elements, since a file of a few bytes may name any shape
_MAX_SIDE = 2**20
_PARTS = ("shape", "sample", "moments", "sums")

Tensors = dict[str, torch.Tensor]


def is_large(tensor: torch.Tensor) -> bool:
    """Return whether a compact golden set keeps a tensor in its compact form."""
    return (
        tensor.is_floating_point()
        and tensor.numel() > LARGE
        and tensor.dim() > 1
        and bool(tensor.isfinite().all())
    )


def compacted(tensors: Mapping[str, torch.Tensor], *, seed: int) -> Tensors:
    """Return what is kept of some tensors: large ones compact, the others as they are.

    Many integers, such as every patch's position, are kept in 16 bits if they fit.
    """
    found: Tensors = {}
    for name, tensor in tensors.items():
        if is_large(tensor):
            kept = compact(tensor, seed=seed)
            parts = (torch.tensor(kept.shape), kept.sample, kept.moments, kept.sums)
            found |= {f"{name}.{part}": value for part, value in zip(_PARTS, parts, strict=True)}
            continue
        are_many = tensor.dtype is torch.int64 and tensor.numel() > LARGE
        narrow = tensor.to(torch.int16) if are_many else tensor
        found[name] = narrow if torch.equal(narrow.to(tensor.dtype), tensor) else tensor
    return found


def recorded(golden: Golden, case: str, phase: Phase, name: str) -> torch.Tensor | CompactTensor:
    """Return a recorded output, whole if it is kept whole."""
    if f"{name}.{_PARTS[0]}" not in golden.tensor_names(case, phase):
        return golden.tensor(case, phase, name)
    shape, sample, moments, sums = (golden.tensor(case, phase, f"{name}.{p}") for p in _PARTS)
    sides = tuple(shape.tolist())
    kept = CompactTensor(
        sides, golden.manifest.seed, sample, moments, sums, tuple(range(len(sample)))
    )
    if not all(0 < side < _MAX_SIDE for side in sides) or not kept.is_consistent:
        raise GoldenDamaged(
            f"{golden.folder / phase_file(phase)}: {name} of {case} is not a compact tensor",
            "record the set again",
        )
    return kept


def recorded_shape(golden: Golden, case: str, phase: Phase, name: str) -> tuple[int, ...]:
    """Return the shape of a recorded output; raise GoldenNotFound if there is none."""
    if name in golden.tensor_names(case, phase):
        return golden.manifest.files[phase_file(phase)].tensors[f"{case}/{name}"].shape
    return tuple(recorded(golden, case, phase, name).shape)


def question_tensors(features: torch.Tensor, *, seed: int) -> Tensors:
    """Return what is kept of the connector's input for large features (…, width)."""
    rows = features.reshape(-1, features.shape[-1])
    places = _draw(len(rows), QUESTION_ROWS, seed=seed)
    shape = torch.tensor(features.shape)
    return {f"{QUESTION}.rows": rows[places], f"{QUESTION}.shape": shape}


def make_question(kept: Mapping[str, torch.Tensor], *, seed: int) -> torch.Tensor:
    """Return the features that `question_tensors` describes; ValueError if they do not fit."""
    rows, shape = kept[f"{QUESTION}.rows"], tuple(kept[f"{QUESTION}.shape"].tolist())
    bounded = all(0 < side <= _MAX_QUESTION for side in shape)
    bounded = bounded and len(shape) > 1 and math.prod(shape) <= _MAX_QUESTION
    if not bounded or rows.shape[1:] != shape[-1:] or not len(rows):
        raise ValueError(f"no features of {shape} can be made of {tuple(rows.shape)}")
    return rows[_draw(len(rows), math.prod(shape[:-1]), seed=seed)].reshape(shape)


def connector_input(golden: Golden, case: str, vision: str) -> torch.Tensor | None:
    """Return the input of the connector's recorded output; None if it is not kept.

    vision: the name of the encoder's output, which is the input in a set that keeps it whole.
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
    drawn = np.random.RandomState([seed, below, count]).randint(0, below, size=count)
    return torch.from_numpy(drawn.astype(np.int64))
