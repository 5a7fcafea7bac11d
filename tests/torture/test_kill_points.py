"""Killed, interrupted or refused at any point of writing: all old or all new, then completed."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.torture.kill_points import (
    RECORDING,
    SHARING,
    Scenario,
    Survival,
    run_undisturbed,
    try_points,
)
from tests.torture.saboteur import Kind

# Of each scenario, drawn from all of them; make torture tries every one.
POINTS = 3


@pytest.mark.parametrize(
    "make",
    [*SHARING, *(pytest.param(make, marks=pytest.mark.record) for make in RECORDING)],
    ids=lambda make: make.__name__,
)
def test_what_fails_anywhere_leaves_old_or_new_sets(
    make: Callable[[Path], Scenario], tmp_path: Path
) -> None:
    """And going on completes them, to the bytes of an undisturbed run."""
    scenario = make(tmp_path / "start")
    whole = run_undisturbed(scenario, tmp_path)
    last = len(whole.operations)
    # The last renames are those of the commit, two if there was a set before.
    commits = [n for n, name in enumerate(whole.operations, 1) if name == "rename"][-2:]
    chance = random.Random(scenario.name)
    total = Survival()
    for kind in Kind:
        drawn = [1, last, *chance.sample(range(1, last + 1), POINTS)] if kind is Kind.KILL else []
        points = sorted({*commits, *drawn})
        survival = try_points(scenario, whole, points, tmp_path / "tried", kind=kind)
        total.failures += survival.failures
        total.found += survival.found
    assert total.failures == [], "\n".join(total.failures[:6])
    # The commit is one step of many: both sides of it must have been tried.
    assert total.found["old"] > 0
    assert total.found["new"] > 0
    assert (total.found["interrupted"] > 0) == bool(whole.before)
