"""Golden sets from strangers: refused in a line or two, or read; nothing else ever happens."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import CHECKOUT, run_snap_here
from tests.torture.configurations import mutate_configuration, write_base
from tests.torture.mutations import MUTATIONS
from tests.torture.pictures import BOMBS, mutate_picture
from tests.torture.schema import changed_manifests
from tests.torture.trial import BUILT, PICTURED, Outcome, run_batch, run_prepared

INPUTS = 200
QUICK_BOMBS = (
    "manifest of 60 million empty lists",
    "configuration nested a million deep",
    "header of a terabyte",
    "shape of 2**62 by 2**62",
)
# Above what the process has: a manifest's values become objects, and one file is mapped at a time.
MEMORY = 900 * 10**6


@pytest.fixture(scope="module", autouse=True)
def installed_fms() -> Iterator[None]:
    """Forget a checkout that other tests here imported: doctor would ask git about it."""
    before, path = dict(sys.modules), list(sys.path)
    for name in [n for n in sys.modules if n == "fms" or n.startswith("fms.")]:
        del sys.modules[name]
    sys.path[:] = [folder for folder in path if folder != str(CHECKOUT)]
    yield
    sys.modules.update(before)
    sys.path[:] = path


def require_harmless(outcome: Outcome) -> None:
    """Fail with the first few things that must not be."""
    assert outcome.violations == [], "\n".join(outcome.violations[:5])
    assert outcome.grown < MEMORY


def test_mutated_sets_are_refused_or_read_and_harm_nobody(tmp_path: Path) -> None:
    """Seeded mutations of everything in a set, with digests that agree; two commands for each."""
    outcome = run_batch(range(INPUTS), tmp_path / "work")
    require_harmless(outcome)
    assert outcome.inputs == INPUTS
    assert set(outcome.mutations) == {mutation.__name__ for mutation, _ in MUTATIONS}
    # Refusals, but not alone: some mutations leave a set that is whole, or one that differs.
    assert outcome.codes["3"] > outcome.codes["0"] > outcome.codes["1"] > 0


def test_configurations_that_a_stranger_wrote_are_refused_or_built(tmp_path: Path) -> None:
    """FMS builds the model that a set describes: no larger a one than the weights are."""
    outcome = run_batch(range(20), tmp_path / "work", mutate=mutate_configuration, ground=BUILT)
    require_harmless(outcome)
    assert outcome.codes["3"] > outcome.codes["0"] > 0


def test_pictures_that_a_stranger_packed_are_refused_or_read(tmp_path: Path) -> None:
    """PNGs with valid checksums over senseless chunks: no line of Pillow's reaches the terminal."""
    work = tmp_path / "work"
    outcome = run_batch(range(60), work, mutate=mutate_picture, ground=PICTURED)
    require_harmless(outcome)
    assert outcome.codes["3"] > 0
    assert outcome.codes["1"] > 0


@pytest.mark.parametrize("name", QUICK_BOMBS)
def test_a_bomb_is_refused_within_bounded_memory(tmp_path: Path, name: str) -> None:
    """By every command, in less than a gigabyte above what the process has."""
    outcome = run_prepared(BOMBS[name], tmp_path / "work", name=name)
    require_harmless(outcome)
    # What is wrong with a header alone does not keep the manifest from being listed and shown.
    assert outcome.codes["3"] >= 4
    assert not outcome.codes["1"]


@settings(max_examples=60, derandomize=True, database=None, deadline=None)
@given(st.text(max_size=40))
def test_what_is_told_stays_on_its_line(text: str) -> None:
    """Control characters, line ends and marks that turn text round are escaped."""
    from snapshot_tool.base.errors import SnapError

    problem = SnapError(text).problem
    assert problem.isprintable()
    assert problem == text or not text.isprintable()


@settings(
    max_examples=40,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(data=st.data())
def test_manifests_that_the_schema_allows_are_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Senseless sizes, names, recipes and files, in the types that a manifest has."""
    folder = write_base(tmp_path_factory.mktemp("drawn"))
    path = folder / "manifest.json"
    manifest = data.draw(changed_manifests(json.loads(path.read_bytes())))
    path.write_text(json.dumps(manifest), encoding="utf-8")
    goldens = ("--goldens", folder.parents[2])
    candidate = ("--candidate", "tests.torture.configurations:Zeros")
    for command in (("list",), ("show",), ("verify",), ("check", *candidate)):
        run = run_snap_here(*command, *goldens)
        assert run.code in (0, 1, 3), run.err
        assert "fault of snap" not in run.err
        assert len(run.err.splitlines()) <= 2
