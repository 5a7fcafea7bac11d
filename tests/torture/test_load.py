"""Many cases in flat memory."""

from __future__ import annotations

from pathlib import Path

from tests.torture.load import check_under_load, multiply_golden

CASES = 160  # so that loading the candidate is over long before half of the run is


def test_memory_does_not_grow_with_the_number_of_cases(tmp_path: Path) -> None:
    """Many cases, of three phases; make torture checks a thousand, of all."""
    multiply_golden(tmp_path, cases=CASES)
    phases = ("--phase", "vision", "--phase", "connector", "--phase", "forward")
    load = check_under_load(tmp_path / "goldens", cases=CASES, options=phases)
    assert load.code == 0, load.said[-2000:]
    assert f"(tensors of {CASES} cases)" in load.said
    assert load.growth < 30, load.memory
