"""What `--quick` saves: generation verified in one pass, beside generation step by step.

usage: python -m benchmarks.quick          (needs goldens of 64 tokens in build/bench/goldens-64)
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.figures import Row, publish
from snapshot_tool.base.errors import CandidateUnavailable
from snapshot_tool.base.phases import Phase
from snapshot_tool.base.protocol import SilentProgress
from snapshot_tool.base.results import Verdict
from snapshot_tool.check.request import CheckRequest
from snapshot_tool.check.session import check
from tests.mutants.candidates import SPEC
from tests.mutants.corpus import MUTANTS
from tests.mutants.forked import Crash, run_forked
from tests.mutants.measure import planted
from tests.mutants.mutant import GENERATION, Mutant

CHECKOUT = Path("build/fms-checkout").resolve()
TOKENS = 64
CASE = "one-image"
PHASES = (Phase.VISION, Phase.FORWARD, Phase.GENERATE)


def seconds_by_phase(*, quick: bool) -> dict[Phase, float]:
    """Check one case, and return what each phase took."""
    request = CheckRequest(
        Path("build/bench/goldens-64"),
        checkpoint="build/bench/true-shape",
        fms_path=CHECKOUT,
        phases=PHASES,
        case=CASE,
        quick=quick,
    )
    report = check(request, SilentProgress())
    if {result.verdict for result in report.results} != {Verdict.PASS}:
        raise SystemExit("the check did not pass")
    seconds: dict[Phase, float] = defaultdict(float)
    for result in report.results:
        seconds[result.phase] = max(seconds[result.phase], result.seconds)
    return seconds


def verdicts(mutant: Mutant) -> tuple[str, str]:
    """Return the first phase that shows a mutant, step by step and with --quick, or ""."""
    found = []
    torch.set_num_threads(1)  # of a job's own process: jobs have the cores between them
    with planted(mutant, CHECKOUT):
        request = CheckRequest(Path("goldens"), candidate=SPEC)
        for quick in (False, True):
            try:
                report = check(replace(request, quick=quick), SilentProgress())
            except CandidateUnavailable:
                found.append("loading")
                continue
            found.append(report.divergence.phase.value if report.divergence else "")
    return found[0], found[1]


def compare_verdicts() -> tuple[list[Row], str]:
    """Check every mutant both ways: rows, and which verdicts differ."""
    same: dict[bool, list[bool]] = {True: [], False: []}
    differing = []
    jobs = {name: partial(verdicts, mutant) for name, mutant in MUTANTS.items()}
    for name, result in run_forked(jobs, workers=2, seconds=600):
        if isinstance(result, Crash):
            raise SystemExit(f"{name}: {result.why}")
        stepwise, quick = result
        same[MUTANTS[name].places == (GENERATION,)].append(stepwise == quick)
        if stepwise != quick:
            differing.append(f"`{name}` ({stepwise or 'nowhere'}, {quick or 'nowhere'})")
    rows = [
        Row(
            f"same first phase, of {len(same[False])} mutants outside of the generation loop",
            sum(same[False]) / len(same[False]),
            "1",
            all(same[False]),
        ),
        Row(f"the same of {len(same[True])} in it", sum(same[True]) / len(same[True])),
    ]
    return rows, ", ".join(sorted(differing)) or "none"


def main() -> None:
    """Measure, print, keep build/bench/quick.json."""
    # First: forks must find no threads.
    agreement, differing = compare_verdicts()
    stepwise, quick = seconds_by_phase(quick=False), seconds_by_phase(quick=True)
    alone = quick[Phase.GENERATE] / stepwise[Phase.GENERATE]
    both, steps = (found[Phase.FORWARD] + found[Phase.GENERATE] for found in (quick, stepwise))
    rows = [
        Row("generate, of its time step by step", alone, "at most 0.35", alone <= 0.35),
        Row("forward and generate together, of their time step by step", both / steps),
        Row("generate step by step, seconds", stepwise[Phase.GENERATE]),
        Row("forward, seconds", stepwise[Phase.FORWARD]),
        Row("forward with the golden's tokens, seconds", quick[Phase.FORWARD]),
        *agreement,
    ]
    publish(
        "quick",
        f"`--quick` at {TOKENS} tokens",
        rows,
        note="True shape, one image. With `--quick` one pass over the prompt and the golden's "
        "tokens gives forward's logits and every step's, so generate adds next to nothing to "
        "forward; without it generate goes on from the cache that forward filled. Mutants are "
        "those of `tests/mutants` on the committed goldens; found elsewhere (step by step, quick): "
        f"{differing}.",
    )


if __name__ == "__main__":
    main()
