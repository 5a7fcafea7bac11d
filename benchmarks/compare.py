"""What comparing a large tensor costs, beside NumPy, plain torch and Polygraphy.

usage: python -m benchmarks.compare          (needs Polygraphy in build/polygraphy)
"""

from __future__ import annotations

import io
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout

import numpy as np
import torch

from benchmarks.figures import OUT, ROOT, Row, publish
from snapshot_tool.base.tolerance import Tolerance
from snapshot_tool.numerics.compare import compare_tensors

ELEMENTS = 50_000_000
SMALLER = 12_625_000  # 50.5 MB, of which Polygraphy takes a second or two
ROUNDS = 4
_IN_A_ROW = 3
TOLERANCE = Tolerance(5e-5, 5e-5)
SITE = OUT.parent / "polygraphy"
Pair = tuple[torch.Tensor, torch.Tensor]


def draw(elements: int, *, spread: float) -> Pair:
    """Return a tensor, and one that differs from it by about `spread`."""
    generator = torch.Generator().manual_seed(0)
    expected = torch.randn(elements, generator=generator)
    return expected, expected + spread * torch.randn(elements, generator=generator)


def best_of(functions: dict[str, Callable[[], object]], *, rounds: int) -> dict[str, float]:
    """Return each function's shortest time in seconds, run in turns, several times each turn."""
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(rounds):
        for name, function in functions.items():
            for _ in range(_IN_A_ROW):  # the first finds the caches full of another's data
                began = time.perf_counter()
                function()
                best[name] = min(best[name], time.perf_counter() - began)
    return best


def ways(pair: Pair) -> dict[str, Callable[[], object]]:
    """Return snap's comparison, NumPy's and plain torch's, of one pair."""
    expected, actual = pair
    one, other = actual.numpy(), expected.numpy()
    return {
        "snap": lambda: compare_tensors(expected, actual, TOLERANCE),
        "numpy": lambda: np.allclose(one, other, atol=TOLERANCE.atol, rtol=TOLERANCE.rtol),
        "plain": lambda: (actual - expected).abs().max(),
    }


def polygraphys(pair: Pair) -> Callable[[], object]:
    """Return Polygraphy's comparison of one pair."""
    sys.path.append(str(SITE))
    from polygraphy.comparator import CompareFunc, IterationResult

    compare = CompareFunc.simple(atol=TOLERANCE.atol, rtol=TOLERANCE.rtol)
    one, other = (IterationResult({"logits": tensor.numpy()}) for tensor in pair)

    def run() -> None:
        # Its log is part of what it does; here nobody reads it.
        with redirect_stdout(io.StringIO()):
            compare(one, other)

    return run


def measure_memory() -> float:
    """Return the megabytes that a comparison takes beyond both tensors, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.compare", "memory"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return float(run.stdout)


def print_memory() -> None:
    """Print by how much a comparison raises this process's largest resident memory, in MB."""
    small = draw(2_000_000, spread=1e-6)
    compare_tensors(*small, TOLERANCE)  # threads and libraries are there now
    expected = torch.zeros(ELEMENTS)
    actual = torch.ones(ELEMENTS)
    expected.add_(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    compare_tensors(expected, actual, TOLERANCE)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 1e6)


def main() -> None:
    """Measure, print, keep build/bench/compare.json."""
    if sys.argv[1:] == ["memory"]:
        print_memory()
        return
    passing = best_of(ways(draw(ELEMENTS, spread=1e-6)), rounds=ROUNDS)
    failing = best_of(ways(draw(ELEMENTS, spread=1e-4)), rounds=ROUNDS)
    pair = draw(SMALLER, spread=1e-6)
    snap = {"snap": ways(pair)["snap"]}
    smaller = best_of({**snap, "polygraphy": polygraphys(pair)}, rounds=ROUNDS)
    faster, slower = passing["numpy"] / passing["snap"], passing["snap"] / passing["plain"]
    against = smaller["polygraphy"] / smaller["snap"]
    beyond = measure_memory()
    rows = [
        Row("times as fast as `np.allclose`", faster, "at least 2.5", faster >= 2.5),
        Row("time, of a plain `(a - b).abs().max()`'s", slower, "at most 1.5", slower <= 1.5),
        Row(
            "times as fast as Polygraphy's `CompareFunc.simple` (12.6 million elements)",
            against,
            "at least 50",
            against >= 50,
        ),
        Row("memory beyond the two tensors, MB", beyond, "at most 64", beyond <= 64),
        Row("speed, GB of golden a second", 4 * ELEMENTS / passing["snap"] / 1e9),
        Row(
            "times as fast as `np.allclose` where half of all elements are beyond the tolerance",
            failing["numpy"] / failing["snap"],
        ),
    ]
    publish(
        "compare",
        "Comparing a tensor of 50 million elements",
        rows,
        note=f"float32, all figures of a result, best of {ROUNDS * _IN_A_ROW}, "
        f"{torch.get_num_threads()} threads. NumPy and Polygraphy tell less: whether all are "
        "close, or a few figures.",
    )


if __name__ == "__main__":
    main()
