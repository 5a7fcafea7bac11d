"""Figures block by block: the quick way in float32 and the exact one give the same answers."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshot_tool import blocks
from snapshot_tool.compare import compare_tensors
from snapshot_tool.core.results import Comparison
from snapshot_tool.core.tolerance import Tolerance

TOLERANCE = Tolerance(5e-5, 5e-5)


def drawn(seed: int, *, size: int, spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a tensor and one that differs from it by about `spread`; a tenth are zeros."""
    generator = torch.Generator().manual_seed(seed)
    expected = torch.randn(size, generator=generator)
    expected[torch.rand(size, generator=generator) < 0.1] = 0.0
    return expected, expected + spread * torch.randn(size, generator=generator)


def assert_alike(one: Comparison, other: Comparison) -> None:
    """Assert that two results are the same but for the rounding of sums in float32."""
    figures = (one.mean_abs, one.rmse, one.cosine)
    assert figures == pytest.approx((other.mean_abs, other.rmse, other.cosine), rel=1e-7)
    same = replace(one, mean_abs=other.mean_abs, rmse=other.rmse, cosine=other.cosine)
    assert same == other


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    spread=st.sampled_from((0.0, 1e-8, 1e-6, 5e-5, 1e-3, 10.0)),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
)
def test_float32_gives_the_figures_of_float64(seed: int, spread: float, dtype: torch.dtype) -> None:
    """The same elements are mismatches, and no figure is off by more than rounding."""
    expected, actual = drawn(seed, size=3000, spread=spread)
    actual = actual.to(dtype)
    quick = compare_tensors(expected, actual, TOLERANCE)
    exact = compare_tensors(expected.double(), actual.double(), TOLERANCE)
    assert quick.mismatched == exact.mismatched
    for name in ("max_abs", "max_rel", "mean_abs", "rmse"):
        assert getattr(quick, name) == pytest.approx(getattr(exact, name), rel=1e-5, abs=1e-12)
    # In proportion to the angle: vectors that are nearly parallel keep all digits of it.
    angle = 1 - exact.cosine
    assert 1 - quick.cosine == pytest.approx(angle, rel=1e-3, abs=1e-12)
    assert quick.worst is not None
    assert exact.worst is not None
    worst, other = (
        abs(w.actual - w.expected) - TOLERANCE.rtol * abs(w.expected)
        for w in (quick.worst, exact.worst)
    )
    assert worst == pytest.approx(other, rel=1e-6, abs=1e-12)


def test_an_element_at_the_very_edge_is_decided_in_float64() -> None:
    """A millionth of the tolerance more or less decides, as if all had been in float64."""
    expected = torch.full((100,), 1000.0)
    steps = torch.arange(100, dtype=torch.float64)
    edge = 1000.0 * (1 + 5e-5) + 5e-5
    actual = (edge + (steps - 50) * 6.2e-5).float()
    allowed = 5e-5 + 5e-5 * 1000.0
    beyond = int(((actual.double() - 1000.0).abs() > allowed).sum())
    assert 40 < beyond < 60
    assert compare_tensors(expected, actual, TOLERANCE).mismatched == beyond


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_figures_do_not_depend_on_the_number_of_threads(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, threads: int
) -> None:
    """Each sum is of one row, by one thread, and rows are added in their order."""
    monkeypatch.setattr(blocks, "_FIRST", 0)
    monkeypatch.setattr(blocks, "_LONG", 1e9)  # none is left to one thread alone
    expected, actual = drawn(0, size=50 * blocks._BLOCK + 7, spread=1e-4)
    expected, actual = expected.to(dtype), actual.to(dtype)
    before = torch.get_num_threads()
    whole = compare_tensors(expected, actual, TOLERANCE)
    torch.set_num_threads(threads)
    try:
        assert compare_tensors(expected, actual, TOLERANCE) == whole
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def _three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_three_threads")
def test_blocks_are_left_to_one_thread_after_one_that_took_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As many the more often it took that long; and the first few, which are soon done."""
    monkeypatch.setattr(blocks, "_FIRST", 1)
    monkeypatch.setattr(blocks, "_ALONE", 2)
    now, slow = [0.0], {0, 2, 7}
    monkeypatch.setattr(blocks, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    threads = []
    for block in blocks._shared_out(range(10)):
        threads.append(torch.get_num_threads())
        now[0] += blocks._LONG * (2.5 if block in slow else 0.5)
    assert threads == [1, 3, 3, 1, 1, 1, 1, 3, 1, 1]
    assert torch.get_num_threads() == 3


@pytest.mark.usefixtures("_three_threads")
def test_torch_has_its_threads_again_where_measuring_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once: while an error is told its traceback still holds what was going on."""

    def fail(*_given: object) -> None:
        assert torch.get_num_threads() == 1
        raise MemoryError

    monkeypatch.setattr(blocks, "_measure", fail)
    try:
        compare_tensors(torch.ones(100), torch.zeros(100), TOLERANCE)
    except MemoryError:
        assert torch.get_num_threads() == 3
    else:
        pytest.fail("nothing was raised")


@pytest.mark.parametrize(("elements", "value"), [(16, 1.1e154), (32, 3e153), (32, 1.1e154)])
def test_sums_beyond_what_a_number_holds_are_infinite(
    monkeypatch: pytest.MonkeyPatch, elements: int, value: float
) -> None:
    """Of rows and of blocks: a candidate's answer differs by that much, the golden is sound."""
    monkeypatch.setattr(blocks, "_BLOCK", 16)
    expected = torch.zeros(elements, dtype=torch.float64)
    found = compare_tensors(expected, torch.full_like(expected, value), TOLERANCE)
    assert (found.mismatched, found.max_abs) == (elements, value)
    assert found.rmse == np.inf


@pytest.mark.parametrize("piece", [1, 5, 20, 59, 60, 1000])
def test_tensors_that_are_not_contiguous_are_measured_in_pieces(
    monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    """Whatever the pieces, figures and the worst element's place are those of a plain copy."""
    numbers = np.random.RandomState(1)
    expected = torch.from_numpy(numbers.randint(-9, 9, (3, 5, 4)).astype(np.float32))
    actual = expected.clone()
    actual[2, 1, 3] += 7
    plain = compare_tensors(expected, actual, TOLERANCE)
    monkeypatch.setattr(blocks, "_PIECE", piece)
    strided = actual.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not strided.is_contiguous()
    assert_alike(compare_tensors(expected, strided, TOLERANCE), plain)
    assert plain.worst is not None
    assert plain.worst.index == (2, 1, 3)


@pytest.mark.parametrize(
    ("rows", "length"), [(1, 1), (1, 7), (7, 1), (4, 3), (4, 30), (16, 1), (16, 7), (119, 1)]
)
def test_figures_do_not_depend_on_the_size_of_blocks(
    monkeypatch: pytest.MonkeyPatch, rows: int, length: int
) -> None:
    """Blocks and their rows are a matter of memory and threads, and of rounding."""
    numbers = np.random.RandomState(0)
    expected = torch.from_numpy(numbers.randint(-50, 50, (4, 5, 6)).astype(np.float32))
    actual = expected.clone()
    actual[3, 4, 4] += 3
    actual[0, 1, 2] += 3
    actual[2, 0, 0] -= 1
    tolerance = Tolerance(0.5, 0.0)
    whole = compare_tensors(expected, actual, tolerance)
    monkeypatch.setattr(blocks, "_ROWS", rows)
    monkeypatch.setattr(blocks, "_BLOCK", rows * length)
    assert_alike(compare_tensors(expected, actual, tolerance), whole)
    assert whole.mismatched == 3
    assert whole.worst is not None
    assert whole.worst.index == (0, 1, 2)


def test_torchs_default_dtype_is_the_candidates_own() -> None:
    """Figures are float32's and float64's whatever a candidate has made the default."""
    expected, actual = drawn(0, size=100, spread=1e-4)
    figures = compare_tensors(expected, actual, TOLERANCE)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert compare_tensors(expected, actual, TOLERANCE) == figures
    finally:
        torch.set_default_dtype(torch.float32)


def test_memory_is_bounded_on_a_machine_of_many_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many threads there are, blocks of one shape have one place, and all fit 64 MB."""
    made: list[int] = []
    space_of = blocks._Space

    def counted(shape: torch.Size) -> object:
        space = space_of(shape)
        made.append(space.compared.nbytes + space.magnitude.nbytes)
        return space

    monkeypatch.setattr(blocks, "_Space", counted)
    before = torch.get_num_threads()
    torch.set_num_threads(64)
    try:
        compare_tensors(*drawn(0, size=3 * blocks._BLOCK + 7, spread=1e-4), TOLERANCE)
    finally:
        torch.set_num_threads(before)
    assert len(made) == 2
    assert sum(made) <= 64e6


def test_what_is_kept_of_a_block_is_small() -> None:
    """Python's own memory grows by less than 1 kB for each block."""
    expected, actual = drawn(2, size=64 * blocks._BLOCK, spread=1e-6)
    tracemalloc.start()
    compare_tensors(expected, actual, TOLERANCE)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * 1000 + 100_000


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.int64, torch.float32, torch.bfloat16, torch.float64],
)
@pytest.mark.parametrize("tolerance", [Tolerance(1e-6, 0.0), TOLERANCE])
def test_what_is_equal_has_the_figures_of_float64(
    dtype: torch.dtype, tolerance: Tolerance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mask that is as it should be is not measured element by element, and yet as if it were."""
    values = torch.randint(1, 100, (3, 1000), generator=torch.Generator().manual_seed(1))
    expected = values.to(dtype)
    quick = compare_tensors(expected, expected.clone(), tolerance)
    monkeypatch.setattr(blocks, "equal_bytes", lambda *_: False)
    exact = compare_tensors(expected.double(), expected.double(), tolerance)
    assert quick == exact
    assert quick.cosine == 1.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_equal_bytes_of_what_has_no_sum_in_float32_are_measured_exactly(value: float) -> None:
    """NaN differs from itself, infinities do not, and large numbers are no infinities."""
    expected = torch.full((3 * blocks._ROWS,), value)
    found = compare_tensors(expected, expected.clone(), TOLERANCE)
    assert found.mismatched == (len(expected) if math.isnan(value) else 0)
    assert (found.cosine == 1.0) == math.isfinite(value)


def test_integers_that_differ_in_one_element_are_told() -> None:
    """Being equal is asked of each block alone."""
    expected = torch.zeros(3 * blocks._BLOCK, dtype=torch.int64)
    actual = expected.clone()
    actual[-1] = 2
    found = compare_tensors(expected, actual, Tolerance(1e-6, 0.0))
    assert (found.mismatched, found.max_abs) == (1, 2.0)
    assert found.worst is not None
    assert found.worst.index == (len(expected) - 1,)


@pytest.mark.parametrize("place", [0, blocks._FEW - 1, blocks._FEW, 100_000, blocks._BLOCK + 1])
def test_the_worst_element_is_found_wherever_it_is(place: int) -> None:
    """A block is looked through in pieces, and places are counted from its beginning."""
    expected = torch.randn(blocks._BLOCK + 10, generator=torch.Generator().manual_seed(2))
    actual = expected + 1e-3
    actual[place] += 1.0
    found = compare_tensors(expected, actual, TOLERANCE)
    assert found.worst is not None
    assert found.worst.index == (place,)


def test_of_equal_integers_the_one_nearest_to_its_tolerance_is_the_worst() -> None:
    """The relative part allows the least of them the least, in whichever block it is."""
    expected = torch.full((3 * blocks._BLOCK,), 9, dtype=torch.int64)
    expected[2 * blocks._BLOCK + 7] = 1
    found = compare_tensors(expected, expected.clone(), TOLERANCE)
    assert found.worst is not None
    assert found.worst.index == (2 * blocks._BLOCK + 7,)
