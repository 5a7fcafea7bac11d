"""The oracle's rule: a candidate's error in proportion to the reference's own."""

from __future__ import annotations

import math

import pytest
import torch

from snapshot_tool.base.tolerance import OracleComparison, OracleTensor, Tolerance, error_multiplier
from snapshot_tool.numerics.compare import compare_with_oracle, position_noise

POSITIONS, WIDTH = 40, 64
NOISE = 1e-4
NO_TOLERANCE = Tolerance(0.0, 0.0)


def random(seed: int, *, size: tuple[int, ...] = (POSITIONS, WIDTH)) -> torch.Tensor:
    """Return normal numbers."""
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_oracle(*, noise: float = NOISE) -> tuple[OracleTensor, torch.Tensor]:
    """Return a recorded tensor whose error is `noise`, and the truth."""
    truth = random(1)
    reference = (truth + noise * random(2)).float()
    delta = (truth - reference.double()).to(torch.bfloat16)
    return OracleTensor(reference, delta, position_noise(reference, truth)), truth


def judge(
    actual: torch.Tensor, *, dtype: str = "float32", tolerance: Tolerance = NO_TOLERANCE
) -> OracleComparison:
    """Judge by an oracle whose reference is off by NOISE."""
    oracle, _ = make_oracle()
    return compare_with_oracle(oracle, actual, tolerance=tolerance, dtype=dtype)


@pytest.mark.parametrize(
    ("numel", "dtype", "multiplier"),
    [
        (10, "float32", 10), (11, "float32", 8), (500, "float32", 8), (501, "float32", 3),
        (999, "float32", 3), (1000, "float32", 2), (1000, "bfloat16", 3), (1000, "float16", 3),
    ],
)  # fmt: skip
def test_small_tensors_and_half_precision_have_a_larger_multiplier(
    numel: int, dtype: str, multiplier: float
) -> None:
    """The steps are those of torch._dynamo.utils.same."""
    assert error_multiplier(numel, dtype=dtype) == multiplier


def test_another_rounding_of_the_same_size_is_within() -> None:
    """A candidate as far from the truth as the reference, in other directions."""
    _, truth = make_oracle()
    figures = judge((truth + NOISE * random(3)).float())
    assert figures.within
    assert figures.error == pytest.approx(figures.reference_error, rel=0.1)
    assert figures.reference_error == pytest.approx(NOISE, rel=0.1)
    assert figures.used < 1


def test_an_error_of_three_times_the_reference_is_beyond() -> None:
    """The multiplier of a large tensor is two."""
    _, truth = make_oracle()
    figures = judge((truth + 3 * NOISE * random(3)).float())
    assert not figures.within
    assert figures.error > figures.limit
    assert figures.used > 1


def test_the_error_is_measured_from_the_oracle_not_from_the_reference() -> None:
    """A candidate that is nearer to the truth than the reference has a smaller error."""
    _, truth = make_oracle()
    assert judge(truth.float()).error < NOISE / 100


def test_a_tenth_of_the_tolerance_is_added() -> None:
    """What the reference's error alone would refuse."""
    _, truth = make_oracle()
    actual = (truth + 3 * NOISE * random(3)).float()
    assert judge(actual, tolerance=Tolerance(20 * NOISE, 0.0)).within
    assert not judge(actual, tolerance=Tolerance(5 * NOISE, 0.0)).within


def test_one_bad_position_is_not_rescued_by_the_mean() -> None:
    """Pooled over the tensor its error stays far below the limit."""
    _, truth = make_oracle()
    actual = (truth + NOISE * random(3)).float()
    actual[17, 3] += 30 * NOISE
    figures = judge(actual)
    assert figures.error < figures.limit
    assert figures.position == (17,)
    assert figures.position_error > figures.position_limit
    assert not figures.within


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_never_within(value: float) -> None:
    """NaN compares with nothing, and must not slip through."""
    _, truth = make_oracle()
    actual = truth.float()
    actual[5, 5] = value
    figures = judge(actual)
    assert not figures.within
    assert figures.used == math.inf


def test_a_few_units_in_the_last_place_are_always_allowed() -> None:
    """A reference without any error of its own, as a copy has none."""
    truth = random(1).float()
    delta = torch.zeros(truth.shape, dtype=torch.bfloat16)
    oracle = OracleTensor(truth, delta, torch.zeros(POSITIONS))
    for dtype, factor in (("float32", 2**-23), ("bfloat16", 2**-8)):
        near, far = (
            compare_with_oracle(
                oracle, truth * (1 + ulps * factor), tolerance=NO_TOLERANCE, dtype=dtype
            )
            for ulps in (1, 100)
        )
        assert near.within
        assert not far.within


def test_a_vector_is_one_position() -> None:
    """The last token's logits, for instance."""
    truth = random(1, size=(480,))
    noise = position_noise((truth + NOISE * random(2, size=(480,))).float(), truth)
    oracle = OracleTensor(truth.float(), torch.zeros(480, dtype=torch.bfloat16), noise)
    figures = compare_with_oracle(oracle, truth.float(), tolerance=NO_TOLERANCE, dtype="float32")
    assert figures.within
    assert figures.position == ()


def test_figures_do_not_depend_on_how_a_tensor_is_cut_into_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Large tensors are read block by block."""
    _, truth = make_oracle()
    actual = (truth + NOISE * random(3)).float()
    whole = judge(actual)
    monkeypatch.setattr("snapshot_tool.numerics.compare._BLOCK", 3 * WIDTH)
    cut = judge(actual)
    assert cut.error == pytest.approx(whole.error, rel=1e-12)
    assert (cut.position, cut.position_error) == (whole.position, whole.position_error)
