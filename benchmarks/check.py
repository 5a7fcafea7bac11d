"""What a check costs beside the live way, which loads both implementations into one process.

usage: python -m benchmarks.check          (needs build/bench/true-shape and its goldens)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.figures import OUT, ROOT, Cost, Row, publish, run_process

SNAP = Path(sys.executable).with_name("snap")
CHECKOUT = "build/fms-checkout"
SITE = "build/live"  # transformers 4.57.6, laid over the check environment
FIXED = "*-image*"
# Runs on a shared machine differ by a third: the best of five was anything from 0.47 to 0.6.
EMBEDDED_ROUNDS = 15

TRUE_SHAPE = ("build/bench/true-shape", "build/bench/goldens")
EMBEDDED = ("tests/checkpoints/tiny-idefics3", "goldens")

# What any run of FMS's model imports, its loop of generation included, and in turn.
_IMPORTS = """
import gc, os
gc.disable()
import torch, fms.models.idefics3, fms.utils.generation
torch._dynamo.config
os._exit(0)
"""


def check_cost(checkpoint: str, goldens: str) -> Cost:
    """Run `snap check` on the two fixed cases, all phases."""
    where = ["--checkpoint", checkpoint, "--goldens", goldens]
    return run_process([str(SNAP), "check", "--fms-path", CHECKOUT, "--case", FIXED, *where])


def live_cost(checkpoint: str) -> Cost:
    """Run both implementations side by side on the same cases."""
    command = [sys.executable, "benchmarks/live.py", checkpoint, CHECKOUT]
    return run_process(command, PYTHONPATH=f"{ROOT / SITE}:{ROOT}")


def import_cost() -> Cost:
    """Import torch and FMS, look for no garbage, and end without taking anything apart."""
    return run_process([sys.executable, "-c", _IMPORTS], PYTHONPATH=str(ROOT / CHECKOUT))


def best(costs: list[Cost]) -> Cost:
    """Return the least of each figure."""
    return Cost(
        min(cost.seconds for cost in costs),
        min(cost.peak for cost in costs),
        min(cost.processor for cost in costs),
    )


def looked_into() -> dict[str, float]:
    """Check the true shape in a process that tells its own times; see benchmarks.inside."""
    path = OUT / "inside.json"
    run_process([sys.executable, "-m", "benchmarks.inside", *TRUE_SHAPE, CHECKOUT, str(path)])
    found: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
    return found


def ratio(what: str, figure: float, limit: float) -> Row:
    """Return a row of something that may be at most `limit`."""
    return Row(what, figure, f"at most {limit:g}", figure <= limit)


def main() -> None:
    """Measure, print, keep build/bench/check.json."""
    mine, live, imports = [], [], []
    for _ in range(EMBEDDED_ROUNDS):
        mine.append(check_cost(*EMBEDDED))
        live.append(live_cost(EMBEDDED[0]))
        imports.append(import_cost())
    small, small_live, bare = best(mine), best(live), best(imports)
    rest = small.seconds - bare.seconds
    true, true_live = check_cost(*TRUE_SHAPE), live_cost(TRUE_SHAPE[0])
    inside = looked_into()
    rows = [
        ratio("true shape, wall time, of the live way's", true.seconds / true_live.seconds, 0.25),
        ratio("true shape, peak memory, of the live way's", true.peak / true_live.peak, 0.6),
        Row("true shape, check, seconds", true.seconds),
        Row("true shape, live way, seconds", true_live.seconds),
        Row("true shape, check, peak memory, GB", true.peak / 1e9),
        Row("true shape, live way, peak memory, GB", true_live.peak / 1e9),
        ratio(
            f"embedded checkpoint, wall time, of the live way's (best of {EMBEDDED_ROUNDS})",
            small.seconds / small_live.seconds,
            0.5,
        ),
        Row("embedded checkpoint, check, seconds", small.seconds),
        Row("embedded checkpoint, live way, seconds", small_live.seconds),
        Row("importing torch and FMS and nothing else, seconds", bare.seconds),
        Row("the same, of the live way's time", bare.seconds / small_live.seconds),
        Row("the check without these imports, of it", rest / small_live.seconds),
        ratio(
            "true shape, share of time outside the candidate's passes and its loading",
            inside["outside"],
            0.05,
        ),
        Row(
            "importing torch and FMS and nothing else, of that time",
            bare.seconds / inside["seconds"],
        ),
        ratio(
            "true shape, vision phase, peak memory beyond the weights, GB", inside["beyond"], 1.0
        ),
        ratio(
            "one image, true shape, tiles through the encoder for each tile there is",
            inside["encoded"],
            1.0,
        ),
        ratio("two images, true shape, passes over the prompt", inside["prompts"], 1.0),
    ]
    publish(
        "check",
        "A check, beside the live way",
        rows,
        note="All phases of the two fixed cases, whole processes. The true shape is "
        "SmolVLM-256M-Instruct's, with random weights (`tests/checkpoints/build_true_shape.py`). "
        "The live way (`benchmarks/live.py`) is one process with transformers 4.57.6 and "
        "ibm-fms 1.13.1 that runs both models, phase by phase, as the parity suite does: one image "
        "through all phases, two through forward and generate. In that release Hugging Face "
        "numbers vision patches otherwise, so what it compares differs; the work is the same. The "
        "shortest case (one image) runs forward without a cache as well, for a port may be wrong "
        "without one: there are two passes over its prompt. What the imports take, every process "
        "that runs the candidate must pay: they are timed without Python's search for garbage and "
        "without its end, as in a check, and in turn; a check loads torch's library beside them.",
    )


if __name__ == "__main__":
    main()
