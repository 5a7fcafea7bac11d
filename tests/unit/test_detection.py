"""Counting what was detected: a miss is a miss, and a job's crash is its own."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import pytest

from tests.mutants.benign import MOST_WAYS, Alarms, benign_runs
from tests.mutants.corpus import MUTANTS
from tests.mutants.false_alarms import Finished, blocks_of, section
from tests.mutants.forked import Crash, run_forked
from tests.mutants.measure import Outcome
from tests.mutants.report import (
    FALSE_ALARMS,
    Detection,
    Fate,
    bound,
    fate,
    interval,
    is_named,
    write_report,
    write_section,
)
from tests.mutants.ways import WAYS

_UNTAKEN = "has 1 weights that nothing takes: lm_head.weight"


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        (Outcome("vision"), Fate.FOUND),
        (Outcome("", "vision"), Fate.FOUND),
        (Outcome(derived=("batch",), change=0), Fate.FOUND),
        (Outcome(change=1.5, question="forward/a"), Fate.MISSED),
        (Outcome(change=math.inf, question="generate/a"), Fate.MISSED),
        (Outcome(change=0.7, question="forward/a"), Fate.EQUIVALENT),
        (Outcome(change=1.2, weights=("w",)), Fate.FOUND),
        (Outcome(change=3e-9, weights=("w",)), Fate.EQUIVALENT),
        (Outcome(change=1.2, probes=("m",)), Fate.FOUND),
        (Outcome(change=0.7, probes=("m",)), Fate.EQUIVALENT),
        (Crash("it died"), Fate.CRASHED),
    ],
)
def test_a_mutant_is_found_missed_or_changes_nothing(
    outcome: Outcome | Crash, expected: Fate
) -> None:
    """A mutant that changes an answer beyond rounding and passes is a miss."""
    assert fate(outcome) is expected


@pytest.mark.parametrize(
    ("name", "outcome", "expected"),
    [
        ("rope-base", Outcome("forward", place="model.text_model.layers.0.self_attn"), True),
        ("rope-base", Outcome("forward", place="model.text_model.layers.0"), False),
        ("rope-base", Outcome("forward", place=""), False),
        ("head-tied", Outcome("loading", place=_UNTAKEN), True),
        ("head-tied", Outcome("loading", place="no such file"), False),
        ("mask-of-first-row", Outcome(derived=("padding", "batch")), True),
        ("mask-of-first-row", Outcome(derived=("generation-batch",)), False),
        ("sampled", Outcome("generate", place="the generation loop"), True),
        ("sampled", Crash("it died"), False),
    ],
)  # fmt: skip
def test_only_an_expected_place_counts_as_named(
    name: str, outcome: Outcome | Crash, *, expected: bool
) -> None:
    """A parent of the module is too coarse."""
    assert is_named(MUTANTS[name], outcome) is expected


def test_misses_crashes_and_alarms_are_counted_apart(tmp_path: Path) -> None:
    """Of all faults one is missed, one crashes, one changes nothing, and one is rightly named."""
    outcomes: dict[str, Outcome | Crash] = {
        **{name: Outcome("forward", place="elsewhere") for name in MUTANTS},
        "rope-base": Outcome("forward", place="model.text_model.layers.0.self_attn"),
        "sampled": Outcome(change=3.0, question="generate/a"),
        "exact-gelu": Crash("it died"),
        "rope-in-bfloat16": Outcome(change=0.0, question="forward/a"),
    }
    alarms: dict[str, Alarms | Crash] = {
        "a": Alarms(),
        "b": Alarms("1 of 9 differ"),
        "c": Crash("took more than 9 s"),
    }
    detection = Detection(outcomes, alarms)
    faults, names, benign = detection.summary()
    real = len(MUTANTS) - 1
    assert faults.startswith(f"{real - 2} of {real} faults")
    assert names.startswith(f"1 of {real - 2} found")
    assert benign.startswith("1 false alarms in 2 benign runs")
    write_report(detection, tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    missed = page.partition("Missed\n")[2].partition("\n#")[0]
    assert "`sampled`" in missed
    assert "it died" in missed
    assert "b: 1 of 9 differ" in page


def test_a_job_that_dies_raises_or_hangs_is_its_own_result() -> None:
    """The other jobs' results come all the same."""

    def die() -> int:
        os._exit(7)

    def fail() -> int:
        raise ValueError("wrong")

    def hang() -> int:
        time.sleep(60)
        return 0

    jobs = {"dies": die, "fails": fail, "hangs": hang, "works": lambda: 3}
    results = dict(run_forked(jobs, workers=2, seconds=2))
    assert results["works"] == 3
    for name in ("dies", "fails", "hangs"):
        assert isinstance(results[name], Crash)


def test_runs_draw_every_way_and_none_twice_about_one_part() -> None:
    """Compiled ports serve runs of equal ways."""
    runs = benign_runs(400)
    assert len(set(runs)) == len(runs) == 400
    assert {name for run in runs for name in run.names} == set(WAYS)
    for run in runs:
        parts = [way.part for way in run.ways]
        assert len(set(parts)) == len(parts) <= MOST_WAYS
        assert not {part for way in run.ways for part in way.excludes}.intersection(parts)
    assert all(len({run.names for run in block}) == 1 for block in blocks_of(runs[-40:]))


def test_the_section_of_false_alarms_counts_them_by_kind(tmp_path: Path) -> None:
    """A run without a result does not count; the other sections stay."""
    page = tmp_path / "page.md"
    page.write_text(
        "# Detection\nall\n\n## False alarms\nformer\n\n## More\nrest\n", encoding="utf-8"
    )
    found = [
        Finished(0, ("2 threads",), 1.0, Alarms()),
        Finished(1, ("2 threads", "quick"), 1.0, Alarms("forward one-image: differs")),
        Finished(2, ("quick",), 1.0, Alarms(oracle="vision")),
        Finished(3, ("quick",), 1.0, Alarms(), "it died"),
    ]
    write_section(FALSE_ALARMS, section(found), page)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# Detection\nall\n\n## False alarms\n")
    assert text.endswith("|\n\n## More\nrest\n")
    assert "former" not in text
    assert "- 1 false alarms in 3 runs" in text
    assert "| threads | 2 threads, 4 threads | 2 | 1 |" in text
    for alarm in ("forward one-image: differs", "vision, by the oracle", "it died"):
        assert f"| {alarm} |" in text
    write_report(Detection(dict.fromkeys(MUTANTS, Crash("it died")), {}), page)
    assert "- 1 false alarms in 3 runs" in page.read_text(encoding="utf-8")


def test_no_alarm_bounds_the_share() -> None:
    """By the rule of three, 3 / n."""
    assert bound(0, 3000) == "at most 0.1 %"
    assert bound(0, 300) == "at most 0.99 %"
    assert bound(1, 100) == interval(1, 100)
