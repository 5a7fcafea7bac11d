"""What `--quick` saves: generation verified in one pass, beside generation step by step.

usage: python -m benchmarks.quick          (needs goldens of 64 tokens in build/bench/goldens-64)
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from benchmarks.figures import Row, publish
from snapshot_tool.core.phases import Phase
from snapshot_tool.core.progress import SilentProgress
from snapshot_tool.core.results import Verdict
from snapshot_tool.workflows.check import CheckRequest, check

TOKENS = 64
CASE = "one-image"
PHASES = (Phase.VISION, Phase.FORWARD, Phase.GENERATE)


def seconds_by_phase(*, quick: bool) -> dict[Phase, float]:
    """Check one case, and return what each phase took."""
    request = CheckRequest(
        Path("build/bench/goldens-64"),
        checkpoint="build/bench/true-shape",
        fms_path=Path("build/fms-checkout"),
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


def main() -> None:
    """Measure, print, keep build/bench/quick.json."""
    stepwise, quick = seconds_by_phase(quick=False), seconds_by_phase(quick=True)
    alone = quick[Phase.GENERATE] / stepwise[Phase.GENERATE]
    both, steps = (found[Phase.FORWARD] + found[Phase.GENERATE] for found in (quick, stepwise))
    rows = [
        Row("generate, of its time step by step", alone, "at most 0.35", alone <= 0.35),
        Row("forward and generate together, of their time step by step", both / steps),
        Row("generate step by step, seconds", stepwise[Phase.GENERATE]),
        Row("forward, seconds", stepwise[Phase.FORWARD]),
        Row("forward with the golden's tokens, seconds", quick[Phase.FORWARD]),
    ]
    publish(
        "quick",
        f"`--quick` at {TOKENS} tokens",
        rows,
        note="True shape, one image. With `--quick` one pass over the prompt and the golden's "
        "tokens gives forward's logits and every step's, so generate adds next to nothing to "
        "forward; without it generate goes on from the cache that forward filled.",
    )


if __name__ == "__main__":
    main()
