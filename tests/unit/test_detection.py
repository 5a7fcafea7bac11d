"""Counting what was detected: a miss is a miss, and a job's crash is its own."""

from __future__ import annotations

import math
import os
import time

import pytest

from tests.mutants.benign import Alarms, Benign, benign_runs, kinds_of
from tests.mutants.corpus import MUTANTS
from tests.mutants.forked import Crash, run_forked
from tests.mutants.measure import Outcome
from tests.mutants.report import Detection, Fate, fate, is_named

_UNTAKEN = "has 1 weights that nothing takes: lm_head.weight"


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        (Outcome("vision"), Fate.FOUND),
        (Outcome("", "vision"), Fate.FOUND),
        (Outcome("", "", ("batch",)), Fate.FOUND),
        (Outcome(change=1.5, question="forward/a"), Fate.MISSED),
        (Outcome(change=math.inf, question="generate/a"), Fate.MISSED),
        (Outcome(change=0.7, question="forward/a"), Fate.EQUIVALENT),
        (Outcome(change=9.0, question="forward/a", exact=3e-9), Fate.EQUIVALENT),
        (Outcome(change=9.0, question="forward/a", exact=1.2), Fate.MISSED),
        (Outcome(change=9.0, exact=1.2, weights=("w",)), Fate.FOUND),
        (Outcome(change=9.0, exact=3e-9, weights=("w",)), Fate.EQUIVALENT),
        (Outcome("vision", exact=3e-9, weights=("w",)), Fate.FOUND),
        (Crash("it died"), Fate.CRASHED),
    ],
)
def test_a_mutant_is_found_missed_or_changes_nothing(
    outcome: Outcome | Crash, expected: Fate
) -> None:
    """What changes an answer beyond rounding and passes is a miss."""
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
def test_only_the_stated_place_counts_as_named(
    name: str, outcome: Outcome | Crash, *, expected: bool
) -> None:
    """A parent of the module is too coarse, and nothing is not a name."""
    assert is_named(MUTANTS[name], outcome) is expected


def test_the_summary_counts_misses_crashes_and_alarms() -> None:
    """Five real faults, three found, one of them named; a mutant without effect is apart."""
    detection = Detection(
        {
            "rope-base": Outcome("forward", place="model.text_model.layers.0.self_attn"),
            "not-causal": Outcome("forward", place="model.text_model"),
            "sampled": Outcome(change=3.0, question="generate/a"),
            "exact-gelu": Crash("it died"),
            "rope-in-bfloat16": Outcome(change=0.0, question="forward/a"),
            "unused-embedding-doubled": Outcome(weights=("embedding",)),
        },
        {"0": Benign(0), "1": Benign(1, threads=2), "2": Benign(2)},
        {"0": Alarms(), "1": Alarms("1 of 9 differ"), "2": Crash("took more than 9 s")},
    )
    assert detection.summary() == [
        "3 of 5 faults found (60.0%): 2 by the table of tolerances, 0 by the oracle, 0 by derived "
        "questions alone, 1 by the comparison of weights alone; 1 more mutants change no answer "
        "beyond rounding",
        "1 of 3 found faults named rightly (33.3%)",
        "1 false alarms in 2 benign runs; 0 by the oracle; 1 more runs gave no result",
    ]


def test_benign_runs_differ_and_cover_every_way() -> None:
    """As many as asked for, no two alike, compiled ones among them."""
    runs = benign_runs(210)
    assert len({str(run) for run in runs}) == len({tuple(kinds_of(run)) for run in runs}) == 210
    kinds = {kind for run in runs for kind in kinds_of(run)}
    assert {"4 threads", "attention eager", "weights unfused on loading", "torch.compile"} <= kinds


def test_a_job_that_dies_raises_or_hangs_is_its_own_result() -> None:
    """The others' results come all the same."""

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
    assert results["dies"] == Crash("the process died with 7")
    assert results["hangs"] == Crash("took more than 2 s")
    failed = results["fails"]
    assert isinstance(failed, Crash)
    assert failed.why.endswith("ValueError: wrong")
