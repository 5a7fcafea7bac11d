"""Comparing weights: exactly, in the candidate's own dtype."""

from __future__ import annotations

import math

import pytest
import torch

from snapshot_tool.base.protocol import WeightPair
from snapshot_tool.base.report import WeightDifference, WeightReport
from snapshot_tool.numerics.compare import compare_weights

WEIGHT = torch.arange(1, 13, dtype=torch.float32).reshape(3, 4) / 1024 + 1


def changed(row: int, by: float) -> torch.Tensor:
    """Return the weight with one row moved."""
    other = WEIGHT.clone()
    other[row] += by
    return other


def test_a_weight_that_differs_anywhere_is_told_with_its_figures() -> None:
    """How many elements, of how many, by how much, and which of the reference's modules."""
    pairs = [
        WeightPair("same", WEIGHT, WEIGHT.clone(), lambda: pytest.fail("asked in vain")),
        WeightPair("other", WEIGHT, changed(1, 0.5), lambda: ("model.norm",)),
    ]
    report = compare_weights(pairs)
    assert report == WeightReport(2, (WeightDifference("other", ("model.norm",), 4, 12, 0.5),))
    assert str(report) == "1 as in the checkpoint, 1 not"
    assert str(report.differing[0]) == (
        "other (model.norm): 4 of 12 elements differ from the checkpoint's, by up to 0.5"
    )


def test_the_checkpoint_is_cast_as_loading_casts_it() -> None:
    """A half-precision candidate of a float32 checkpoint has its weights; rounded ones have not."""
    half = WEIGHT.to(torch.bfloat16)
    assert not compare_weights([WeightPair("half", WEIGHT, half)]).differing
    assert compare_weights([WeightPair("rounded", WEIGHT, half.float())]).differing


def test_nan_equals_nan_alone() -> None:
    """A weight that became NaN is told; one that is NaN in the checkpoint is as it was loaded."""
    spoilt = changed(0, math.nan)
    assert not compare_weights([WeightPair("as loaded", spoilt, spoilt.clone())]).differing
    (found,) = compare_weights([WeightPair("spoilt", WEIGHT, spoilt)]).differing
    assert found.mismatched == 4
    assert math.isnan(found.max_abs)


def test_a_weight_without_a_partner_is_counted_apart() -> None:
    """It is neither equal nor different; so is one of another shape, such as a shard."""
    pairs = [WeightPair("alone", WEIGHT, None), WeightPair("shard", WEIGHT, WEIGHT[:2])]
    report = compare_weights([*pairs, WeightPair("whole", WEIGHT, WEIGHT)])
    assert report == WeightReport(1, (), ("alone", "shard"))
    assert str(report) == "1 as in the checkpoint, 2 not compared"
