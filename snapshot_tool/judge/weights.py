"""Comparing a candidate's weights with the checkpoint's, exactly: loading rounds nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from snapshot_tool.base.memory import equal_bytes
from snapshot_tool.base.weights import WeightDifference, WeightReport

if TYPE_CHECKING:
    import torch

    from snapshot_tool.base.protocol import WeightPair


def compare_weights(
    pairs: Iterable[WeightPair],
    *,
    unset: tuple[str, ...] = (),
    harmful: tuple[str, ...] | None = (),
) -> WeightReport:
    """Compare weights pair by pair, holding one pair at a time.

    The checkpoint's are cast to the dtype of the candidate's, as loading casts them. Equal means
    equal in every element; NaN equals NaN.
    """
    compared, differing, left = 0, [], []
    for pair in pairs:
        if pair.actual is None or pair.actual.shape != pair.expected.shape:
            left.append(pair.name)
            continue
        compared += 1
        if found := _difference(pair, pair.actual):
            differing.append(found)
    return WeightReport(compared, tuple(differing), tuple(left), unset, harmful)


def _difference(pair: WeightPair, actual: torch.Tensor) -> WeightDifference | None:
    actual = actual.detach()
    expected = pair.expected.to(actual.device, actual.dtype)
    # The first look costs one reading of both; all the rest is for weights that are wrong.
    if equal_bytes(expected, actual):
        return None
    mismatched = int(((expected != actual) & ~(expected.isnan() & actual.isnan())).sum())
    if not mismatched:
        return None
    largest = float((actual.double() - expected.double()).abs().max())
    return WeightDifference(pair.name, pair.modules(), mismatched, actual.numel(), largest)
