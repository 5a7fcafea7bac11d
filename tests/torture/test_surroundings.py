"""A disk that is full or read-only, and limits of files: refused for real, nothing is injected."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.torture.kill_points import Scenario, run_undisturbed
from tests.torture.namespaces import MountRefusedError
from tests.torture.scenarios import pull_another, pull_first, record_first, record_update
from tests.torture.surroundings import SURROUNDINGS, try_surrounding

GRADES = 5  # make torture tries more
ALWAYS_REFUSED = ("read-only disk", "read-only folder")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    """Have no threads where processes are forked."""
    torch.set_num_threads(1)


def require_old_or_new(make: Callable[[Path], Scenario], tmp_path: Path) -> None:
    """Try every surrounding; one that cannot be had here is a skip that says so."""
    scenario = make(tmp_path / "start")
    whole = run_undisturbed(scenario, tmp_path)
    not_had = []
    for name in SURROUNDINGS:
        try:
            tried = try_surrounding(name, scenario, whole, tmp_path / "tried", count=GRADES)
        except MountRefusedError as refused:
            not_had.append(f"{name} ({refused})")
            continue
        assert tried.failures == []
        assert tried.refused > 0, name
        assert bool(tried.completed) is (name not in ALWAYS_REFUSED), name
    if not_had:
        pytest.skip(f"nobody may mount here, all else passed; NOT TRIED: {', '.join(not_had)}")


@pytest.mark.parametrize("make", [pull_first, pull_another], ids=lambda make: make.__name__)
def test_a_pull_that_the_system_refuses_leaves_old_or_new_sets(
    make: Callable[[Path], Scenario], tmp_path: Path
) -> None:
    """And pulling again where there is room completes it."""
    require_old_or_new(make, tmp_path)


@pytest.mark.record
@pytest.mark.parametrize("make", [record_first, record_update], ids=lambda make: make.__name__)
def test_a_recording_that_the_system_refuses_leaves_old_or_new_sets(
    make: Callable[[Path], Scenario], tmp_path: Path
) -> None:
    """And going on where there is room completes it."""
    require_old_or_new(make, tmp_path)
