"""Killed, interrupted or refused at any point of writing: all old or all new, then completed."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.torture.kill_points import Scenario, Survival, run_undisturbed, try_points
from tests.torture.saboteur import Kind
from tests.torture.scenarios import RECORDING, SHARING

POINTS = 10  # of each scenario, drawn from all of them; make torture tries every one
OTHER_POINTS = 2  # for each other kind of fault


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    """Have no threads where processes are forked."""
    torch.set_num_threads(1)


def require_survival(make: Callable[[Path], Scenario], tmp_path: Path) -> None:
    """Try some points of a scenario, the first and the last among them."""
    scenario = make(tmp_path / "start")
    whole = run_undisturbed(scenario, tmp_path)
    last = len(whole.operations)
    chance = random.Random(scenario.name)
    total = Survival()
    for kind in Kind:
        count = POINTS if kind is Kind.KILL else OTHER_POINTS
        points = sorted({1, last, *chance.sample(range(1, last + 1), count)})
        survival = try_points(scenario, whole, points, tmp_path / "tried", kind=kind)
        total.failures += survival.failures
        total.found += survival.found
    assert total.failures == [], "\n".join(total.failures[:6])
    # The commit is one step of many: both sides of it must have been tried.
    assert total.found["old"] > 0
    assert total.found["new"] > 0
    assert total.found["a mixture"] == 0


@pytest.mark.parametrize("make", SHARING, ids=lambda make: make.__name__)
def test_a_pull_that_fails_anywhere_leaves_old_or_new_sets(
    make: Callable[[Path], Scenario], tmp_path: Path
) -> None:
    """And pulling again completes it, to the bytes of an undisturbed pull."""
    require_survival(make, tmp_path)


@pytest.mark.record
@pytest.mark.parametrize("make", RECORDING, ids=lambda make: make.__name__)
def test_a_recording_that_fails_anywhere_leaves_old_or_new_sets(
    make: Callable[[Path], Scenario], tmp_path: Path
) -> None:
    """And going on completes it, to the bytes of an undisturbed recording."""
    require_survival(make, tmp_path)
