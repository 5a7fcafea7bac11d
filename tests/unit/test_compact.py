"""Compact tensors: what is within tolerance passes, and what is not is seen by some part."""

from __future__ import annotations

import pytest
import torch

from snapshot_tool.base.results import Verdict
from snapshot_tool.base.tolerance import Tolerance
from snapshot_tool.judge.phases import pairs_with
from snapshot_tool.numerics.compact import CompactTensor, compact
from snapshot_tool.numerics.compare import judge_tensor

TOLERANCE = Tolerance(3e-4, 3e-4)
SEED = 42


def features(*shape: int) -> torch.Tensor:
    """Return numbers as an encoder gives them: spread, and some far out."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    values[..., 0] *= 30
    return values


def allowed(expected: torch.Tensor) -> torch.Tensor:
    """Return how far each element may be off; a hair less, for the rounding of float32."""
    return (TOLERANCE.atol + TOLERANCE.rtol * expected.abs()) * 0.999


def failing(expected: torch.Tensor | CompactTensor, actual: object) -> list[str]:
    """Return which parts of a compact tensor another tensor fails by."""
    kept = compact(expected, seed=SEED) if isinstance(expected, torch.Tensor) else expected
    failed = []
    for pair in pairs_with(kept, actual, "x"):
        judged, tolerance = pair.in_units(TOLERANCE)
        verdict, _, _ = judge_tensor(judged.expected, judged.actual, tolerance)
        if verdict is Verdict.FAIL:
            failed.append(pair.tensor)
    return failed


@pytest.mark.parametrize("shape", [(7, 64, 48), (3000, 9)], ids=["tiles", "one block"])
@pytest.mark.parametrize(
    "errors",
    [
        lambda t, _: t,
        lambda t, _: -t,
        lambda t, x: t * x.sign(),
        lambda t, _: t * (torch.rand(t.shape) * 2 - 1),
        lambda t, _: t * torch.where(torch.rand(t.shape) < 0.5, -1, 1),
        lambda t, _: t * (torch.arange(t.shape[-1]) % 2 * 2 - 1),
    ],
    ids=["up", "down", "outwards", "uniform", "random signs", "alternating"],
)
def test_whatever_is_within_tolerance_everywhere_passes(
    shape: tuple[int, ...], errors: object
) -> None:
    """The bounds follow from the tolerance: no port fails by them that the whole tensor passes."""
    assert callable(errors)
    torch.manual_seed(0)
    expected = features(*shape)
    assert failing(expected, expected + errors(allowed(expected), expected)) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_not_finite_is_seen_wherever_it_is(value: float) -> None:
    """No sample has every element; the extremes and the sums do."""
    expected = features(5, 64, 48)
    for place in range(0, expected.numel(), 1511):
        actual = expected.clone()
        actual.view(-1)[place] = value
        assert "x.sums" in failing(expected, actual)


def test_an_error_beyond_tolerance_everywhere_is_seen_by_the_sample() -> None:
    """However it is spread, and however small."""
    expected = features(5, 64, 48)
    assert "x.sample" in failing(expected, expected + 1.01 * allowed(expected) / 0.999)


def exchanged(values: torch.Tensor) -> torch.Tensor:
    """Exchange two patches of one tile."""
    values[3, [5, 9]] = values[3, [9, 5]]
    return values


def negated(values: torch.Tensor) -> torch.Tensor:
    """Negate one patch of one tile."""
    values[2, 7] *= -1
    return values


@pytest.mark.parametrize("fault", [exchanged, negated])
def test_order_and_sign_are_seen_by_the_sums(fault: object) -> None:
    """Moments alone may be the same, and the sample may have none of the places."""
    assert callable(fault)
    expected = features(5, 256, 96)
    assert "x.sums" in failing(expected, fault(expected.clone()))


def test_exchanged_tiles_are_seen() -> None:
    """Each tile has a record of its own."""
    expected = features(4, 64, 48)
    assert failing(expected, expected[[0, 2, 1, 3]]) == ["x.sample", "x.moments", "x.sums"]


def test_some_tiles_in_any_order_are_judged_by_their_own_records() -> None:
    """As derived questions ask for them."""
    expected = features(6, 64, 48)
    some = compact(expected, seed=SEED).of_blocks([4, 0, 4])
    assert failing(some, expected[[4, 0, 4]]) == []
    assert failing(some, expected[[4, 4, 0]]) != []


def test_the_sample_of_many_blocks_is_no_larger_than_that_of_few() -> None:
    """Three images of 17 tiles take what one takes; each tile has its share."""
    expected = features(51, 64, 256)
    kept = compact(expected, seed=SEED)
    assert kept.sample.shape == (51, 642)
    assert failing(expected, expected) == []
    assert failing(kept.of_blocks([50, 3]), expected[[50, 3]]) == []
    assert failing(kept.of_blocks([50, 3]), expected[[3, 50]]) != []


def test_a_set_with_larger_samples_of_many_blocks_is_still_read() -> None:
    """Those recorded before samples had a common bound have 2,048 elements of each block."""
    expected = features(51, 64, 256)
    older = compact(expected, seed=SEED, sampled=2048)
    assert older.is_consistent
    assert failing(older, expected) == []
    assert "x.sample" in failing(older, expected + 1)
    assert not compact(expected, seed=SEED, sampled=700).is_consistent


def test_another_shape_or_type_is_named_as_of_a_whole_tensor() -> None:
    """The reason is the one that a full golden set gives."""
    expected = compact(features(4, 64, 48), seed=SEED)
    for actual, reason in [
        (torch.zeros(4, 48, 64), "shape mismatch: expected (4, 64, 48), actual (4, 48, 64)"),
        ("features", "expected a tensor, actual is str"),
    ]:
        (pair,) = pairs_with(expected, actual, "x")
        assert judge_tensor(pair.expected, pair.actual, TOLERANCE)[1] == reason
    pairs = pairs_with(expected, features(4, 64, 48).double(), "x")
    assert "dtype mismatch" in judge_tensor(pairs[0].expected, pairs[0].actual, TOLERANCE)[1]


def test_a_tolerance_of_nothing_allows_the_same_numbers() -> None:
    """--atol 0 --rtol 0: sums may be added up in another order, nothing else."""
    kept = compact(features(4, 64, 48), seed=SEED)
    for pair in pairs_with(kept, features(4, 64, 48), "x"):
        judged, tolerance = pair.in_units(Tolerance(0.0, 0.0))
        assert judge_tensor(judged.expected, judged.actual, tolerance)[0] is Verdict.PASS
