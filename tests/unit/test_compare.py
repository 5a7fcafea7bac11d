"""Figures and verdict on one tensor against its golden."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from snapshot_tool.base.results import Comparison, Verdict, Worst
from snapshot_tool.base.tolerance import EXACT, Tolerance
from snapshot_tool.numerics import compare
from snapshot_tool.numerics.compare import compare_tensors, judge_tensor

INF, NAN = math.inf, math.nan
TOLERANCES = (
    EXACT,
    Tolerance(1e-6, 0.0),
    Tolerance(0.0, 1e-3),
    Tolerance(5e-5, 5e-5),
    Tolerance(0.5, 0.25),
)
SPECIAL = (0.0, -0.0, 1.0, -1.0, 1.00004, 1.25, NAN, INF, -INF, 1e-45, 3e38)

fast = settings(max_examples=200, deadline=None, database=None, derandomize=True)

any_value = st.one_of(st.sampled_from(SPECIAL), st.floats(width=32))
finite_value = st.floats(-1e6, 1e6, width=32)


def pairs(value: st.SearchStrategy[float]) -> st.SearchStrategy[list[tuple[float, float]]]:
    """Draw lists of (expected, actual), many of them equal or nearly so."""
    equal = value.map(lambda v: (v, v))
    near = st.tuples(value, st.sampled_from((1e-7, 5e-5, -5e-5, 1e-3))).map(
        lambda drawn: (drawn[0], drawn[0] + drawn[1])
    )
    return st.lists(st.one_of(equal, near, st.tuples(value, value)), min_size=1, max_size=24)


def tensors(
    drawn: list[tuple[float, float]], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the drawn pairs as two tensors, expected and actual."""
    expected, actual = (torch.tensor(side, dtype=dtype) for side in zip(*drawn, strict=True))
    return expected, actual


def judge(
    expected: list[Any], actual: list[Any], tolerance: Tolerance = EXACT
) -> tuple[Verdict, str, Comparison]:
    """Judge two lists of numbers that can be compared."""
    verdict, reason, figures = judge_tensor(torch.tensor(expected), torch.tensor(actual), tolerance)
    assert figures is not None
    return verdict, reason, figures


def straightforward_figures(
    expected: NDArray[np.float64], actual: NDArray[np.float64], tolerance: Tolerance
) -> dict[str, Any]:
    """Return the figures as their definitions say, in NumPy and in one go."""
    diff = np.abs(actual - expected)
    excess = diff - (tolerance.atol + tolerance.rtol * np.abs(expected))
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.where(diff == 0, 0.0, diff / np.abs(expected))
    return {
        "max_abs": diff.max(),
        "max_rel": relative.max(),
        "mean_abs": diff.mean(),
        "rmse": np.sqrt(np.mean(diff**2)),
        "mismatched": int((excess > 0).sum()),
        "numel": diff.size,
        "index": tuple(int(i) for i in np.unravel_index(excess.argmax(), excess.shape)),
    }


@given(drawn=pairs(any_value), tolerance=st.sampled_from(TOLERANCES))
@fast
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_verdict_agrees_with_torch_allclose(
    dtype: torch.dtype, drawn: list[tuple[float, float]], tolerance: Tolerance
) -> None:
    """The verdict is torch.allclose's in float64, for NaN, Inf and no tolerance at all too."""
    expected, actual = tensors(drawn, dtype)
    verdict, _, figures = judge_tensor(expected, actual, tolerance)
    close = torch.isclose(
        actual.double(), expected.double(), rtol=tolerance.rtol, atol=tolerance.atol
    )
    assert figures is not None
    assert figures.mismatched == int((~close).sum())
    allclose = torch.allclose(
        actual.double(), expected.double(), rtol=tolerance.rtol, atol=tolerance.atol
    )
    assert verdict is (Verdict.PASS if allclose else Verdict.FAIL)


@given(drawn=pairs(finite_value), tolerance=st.sampled_from(TOLERANCES), columns=st.integers(1, 3))
@fast
def test_figures_are_those_of_a_straightforward_computation(
    drawn: list[tuple[float, float]], tolerance: Tolerance, columns: int
) -> None:
    """Every figure follows its definition, but for the rounding of float32."""
    sides = tensors(drawn * columns, torch.float32)
    expected, actual = (side.reshape(-1, columns) for side in sides)
    figures = compare_tensors(expected, actual, tolerance)
    wanted = straightforward_figures(expected.double().numpy(), actual.double().numpy(), tolerance)
    for name in ("max_abs", "max_rel", "mean_abs", "rmse"):
        assert getattr(figures, name) == pytest.approx(wanted[name], rel=1e-6, abs=1e-18)
    assert figures.mismatched == wanted["mismatched"]
    assert figures.numel == wanted["numel"]
    index = wanted["index"]
    assert figures.worst == Worst(index, expected[index].item(), actual[index].item())


@pytest.mark.parametrize(
    ("expected", "actual", "cosine"),
    [
        ([3.0, 4.0], [4.0, 3.0], 24 / 25),
        ([1.0, 2.0, 2.0], [-1.0, -2.0, -2.0], -1.0),
        ([1.0, 0.0], [0.0, 5.0], 0.0),
        ([2.0, 3.0, 6.0], [4.0, 6.0, 12.0], 1.0),
        ([0.0, 0.0], [0.0, 0.0], 1.0),
        ([0.0, 0.0], [0.0, 1.0], 0.0),
        ([0.0, 1.0], [0.0, 0.0], 0.0),
    ],
)
def test_cosine_is_that_of_the_angle_between_flat_vectors(
    expected: list[float], actual: list[float], cosine: float
) -> None:
    """Cosine is dot over norms; 1 where both vectors are zero, 0 where one is."""
    _, _, figures = judge(expected, actual)
    assert figures.cosine == pytest.approx(cosine, abs=1e-15)


@pytest.mark.parametrize(
    ("expected", "actual", "max_rel"),
    [
        ([0.0, 4.0], [0.0, 5.0], 0.25),
        ([0.0, 4.0], [1e-30, 4.0], INF),
        ([0.0, 0.0], [0.0, -0.0], 0.0),
        ([-8.0, 2.0], [-6.0, 2.0], 0.25),
    ],
)
def test_max_rel_is_infinite_where_only_the_expected_value_is_zero(
    expected: list[float], actual: list[float], max_rel: float
) -> None:
    """A relative difference is 0 between two zeros and inf from zero to anything else."""
    _, _, figures = judge(expected, actual)
    assert figures.max_rel == max_rel


def test_the_limit_of_the_tolerance_itself_passes() -> None:
    """|actual - expected| may be as large as atol + rtol * |expected|, and no larger."""
    tolerance = Tolerance(0.5, 0.25)
    verdict, _, _ = judge([4.0], [5.5], tolerance)
    assert verdict is Verdict.PASS
    verdict, _, _ = judge([4.0], [5.5 + 2**-20], tolerance)
    assert verdict is Verdict.FAIL


def test_the_tolerance_is_relative_to_the_expected_value() -> None:
    """Rtol is taken of the golden, not of the candidate."""
    tolerance = Tolerance(0.0, 0.5)
    assert judge([2.0], [3.0], tolerance)[0] is Verdict.PASS
    assert judge([3.0], [2.0], tolerance)[0] is Verdict.PASS
    assert judge([1.0], [2.0], tolerance)[0] is Verdict.FAIL
    assert judge([2.0], [1.0], tolerance)[0] is Verdict.PASS


@pytest.mark.parametrize("size", [1, 3, 16, 1000])
@pytest.mark.parametrize("place", [0, 2, 3, 9])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_value_that_is_no_number_is_never_lost_between_blocks(
    monkeypatch: pytest.MonkeyPatch, size: int, place: int, bad: float
) -> None:
    """One NaN or Inf anywhere fails, is counted once, is the worst, and shows in max_abs."""
    monkeypatch.setattr(compare, "_BLOCK", size)
    expected = torch.arange(10.0)
    actual = expected.clone()
    actual[1] += 100
    actual[place] = bad
    verdict, _, figures = judge_tensor(expected, actual, Tolerance(1000.0, 1000.0))
    assert verdict is Verdict.FAIL
    assert figures is not None
    assert figures.mismatched == 1
    assert figures.worst is not None
    assert figures.worst.index == (place,)
    assert math.isnan(figures.max_abs) if math.isnan(bad) else figures.max_abs == INF


@pytest.mark.parametrize(
    ("actual", "name"), [([1.0, NAN, 3.0], "1 NaN"), ([INF, 2.0, -INF], "2 Inf")]
)
def test_nan_and_inf_are_named_in_the_reason(actual: list[float], name: str) -> None:
    """A reason says how many NaN or Inf the candidate returned."""
    verdict, reason, _ = judge([1.0, 2.0, 3.0], actual, Tolerance(10.0, 10.0))
    assert verdict is Verdict.FAIL
    assert f", {name};" in reason


def test_nan_in_the_golden_too_still_fails() -> None:
    """NaN equals nothing, not even the golden's NaN: a broken golden is not confirmed."""
    verdict, _, figures = judge([1.0, NAN], [1.0, NAN], Tolerance(1.0, 1.0))
    assert verdict is Verdict.FAIL
    assert figures.mismatched == 1


@pytest.mark.parametrize("tolerance", TOLERANCES)
def test_equal_infinities_pass(tolerance: Tolerance) -> None:
    """Inf where the golden has the same Inf is no difference, whatever the tolerance."""
    verdict, reason, figures = judge([INF, -INF, 1.0], [INF, -INF, 1.0], tolerance)
    assert (verdict, reason) == (Verdict.PASS, "")
    assert (figures.max_abs, figures.max_rel, figures.mismatched) == (0.0, 0.0, 0)


@pytest.mark.parametrize("tolerance", [EXACT, Tolerance(1e-6, 0.0), Tolerance(0.0, 1e-3)])
@pytest.mark.parametrize("actual", [-INF, 0.0, 3e38, NAN])
def test_anything_but_inf_fails_where_the_golden_has_inf(
    tolerance: Tolerance, actual: float
) -> None:
    """An infinite golden makes no infinite allowance."""
    assert judge([INF], [actual], tolerance)[0] is Verdict.FAIL


@pytest.mark.parametrize("tolerance", [EXACT, Tolerance(1e-3, 0.0), Tolerance(1e-3, 1e-3)])
def test_worst_is_the_mismatch_and_not_an_equal_infinity(tolerance: Tolerance) -> None:
    """Equal infinities are no difference, so another element is the worst."""
    verdict, reason, figures = judge([INF, 1.0, 2.0], [INF, 1.0, 2.5], tolerance)
    assert verdict is Verdict.FAIL
    assert figures.worst == Worst((2,), 2.0, 2.5)
    assert "worst at [2]: expected 2, actual 2.5" in reason


@pytest.mark.parametrize("sides", [((2, 3), (3, 2)), ((6,), (2, 3)), ((1,), ()), ((0,), (1,))])
def test_another_shape_fails_by_name(sides: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    """Shapes are not broadcast or flattened: both are named, and there are no figures."""
    expected, actual = (torch.zeros(shape) for shape in sides)
    assert judge_tensor(expected, actual, Tolerance(1.0, 1.0)) == (
        Verdict.FAIL,
        f"shape mismatch: expected {sides[0]}, actual {sides[1]}",
        None,
    )


def test_another_dtype_fails_by_name() -> None:
    """Equal numbers of another dtype are another answer."""
    verdict, reason, figures = judge_tensor(torch.zeros(2), torch.zeros(2).double(), EXACT)
    assert verdict is Verdict.FAIL
    assert reason == "dtype mismatch: expected torch.float32, actual torch.float64"
    assert figures is None


@pytest.mark.parametrize(
    ("actual", "name"), [(None, "NoneType"), ([1.0], "list"), (np.zeros(1), "ndarray")]
)
def test_an_output_that_is_no_tensor_fails_by_name(actual: object, name: str) -> None:
    """A candidate that returns something else is told what it returned."""
    assert judge_tensor(torch.zeros(1), actual, EXACT) == (
        Verdict.FAIL,
        f"expected a tensor, actual is {name}",
        None,
    )


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 0, 2)])
def test_an_empty_tensor_never_passes(shape: tuple[int, ...]) -> None:
    """Nothing compared is nothing proved."""
    verdict, reason, figures = judge_tensor(torch.zeros(shape), torch.zeros(shape), EXACT)
    assert verdict is Verdict.FAIL
    assert reason == "the golden tensor is empty: nothing to compare"
    assert figures is None


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_integers_are_compared_exactly(dtype: torch.dtype) -> None:
    """One step in one element fails; equal ones pass."""
    expected = torch.tensor([1, 0, 1, 1], dtype=dtype)
    actual = expected.clone()
    assert judge_tensor(expected, actual, EXACT)[0] is Verdict.PASS
    actual[2] = 0
    verdict, reason, figures = judge_tensor(expected, actual, EXACT)
    assert verdict is Verdict.FAIL
    assert reason == (
        "1 of 4 differ (25.00%); worst at [2]: expected 1, actual 0 (|diff| 1 > 0 allowed)"
    )
    assert figures is not None
    assert figures.mismatched == 1


def test_large_integers_one_apart_differ() -> None:
    """Integers that float32 cannot tell apart are told apart."""
    large = 2**53 - 2
    assert judge([large], [large + 1])[0] is Verdict.FAIL
    assert judge([large], [large])[0] is Verdict.PASS


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_measured_without_further_rounding(dtype: torch.dtype) -> None:
    """Differences of 16-bit floats are taken in float64."""
    expected = torch.tensor([1.0, 256.0], dtype=dtype)
    actual = torch.tensor([1.0, 258.0], dtype=dtype)
    verdict, _, figures = judge_tensor(expected, actual, Tolerance(2.0, 0.0))
    assert verdict is Verdict.PASS
    assert figures is not None
    assert (figures.max_abs, figures.max_rel) == (2.0, 2 / 256)


def test_a_scalar_tensor_is_compared_and_its_index_is_empty() -> None:
    """A tensor without dimensions has one element, at []."""
    verdict, reason, figures = judge_tensor(torch.tensor(1.0), torch.tensor(3.0), EXACT)
    assert verdict is Verdict.FAIL
    assert reason == (
        "1 of 1 differ (100.00%); worst at []: expected 1, actual 3 (|diff| 2 > 0 allowed)"
    )
    assert figures is not None
    assert figures.worst == Worst((), 1.0, 3.0)


def test_strided_tensors_are_compared_element_by_element() -> None:
    """A transposed, sliced or expanded view counts as its elements, in its own order."""
    base = torch.arange(24.0).reshape(4, 6)
    for view in (base.t(), base[:, ::2], base[1:, 3:], base[0].expand(4, 6)):
        copy = view.clone(memory_format=torch.contiguous_format)
        assert judge_tensor(copy, view, EXACT)[0] is Verdict.PASS
        assert judge_tensor(view, copy, EXACT)[0] is Verdict.PASS
        copy[2, 1] += 1
        _, _, figures = judge_tensor(view, copy, EXACT)
        assert figures is not None
        assert figures.worst == Worst((2, 1), view[2, 1].item(), view[2, 1].item() + 1)


def test_comparing_leaves_both_tensors_as_they_are() -> None:
    """Float64 needs no copy, so in-place work on it would spoil the golden."""
    expected, actual = torch.tensor([1.0, INF]).double(), torch.tensor([2.0, INF]).double()
    judge_tensor(expected, actual, EXACT)
    assert expected.tolist() == [1.0, INF]
    assert actual.tolist() == [2.0, INF]
