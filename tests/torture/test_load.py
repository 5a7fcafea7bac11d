"""Many cases in flat memory, and a clear error where memory is short."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.torture.load import (
    check_under_load,
    check_with_limit,
    least_for_python,
    multiply_golden,
)

CASES = 160  # so that loading the candidate is over long before half of the run is


def test_memory_does_not_grow_with_the_number_of_cases(tmp_path: Path) -> None:
    """Many cases, of three phases; make torture checks a thousand, of all."""
    multiply_golden(tmp_path, cases=CASES)
    phases = ("--phase", "vision", "--phase", "connector", "--phase", "forward")
    load = check_under_load(tmp_path / "goldens", cases=CASES, options=phases)
    assert load.code == 0, load.said[-2000:]
    assert f"(tensors of {CASES} cases)" in load.said
    assert load.growth < 30, load.memory


# Below the first Python starts, and fails before anything of snap is read.
@pytest.mark.parametrize("megabytes", [1, 3, 8, 20, 100, 600, 700])
def test_a_check_that_gets_too_little_memory_says_so(megabytes: int) -> None:
    """Exit 3 in two lines, whichever library is the first to be refused: never 1, never a kill."""
    limit = least_for_python() + megabytes if megabytes < 100 else megabytes
    code, said = check_with_limit(limit)
    assert code == 3, said
    assert said.startswith("snap: not enough memory")
    assert len(said.splitlines()) == 2
