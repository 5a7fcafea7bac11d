"""One check at the true shape that tells where its time and memory went.

usage: python -m benchmarks.inside CHECKPOINT GOLDENS FMS_CHECKOUT OUT.json

Counted as the candidate's own: loading its weights, and what its methods take, but for what snap
itself does within them (digests and copies of what is served between phases).
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BEGAN = time.perf_counter()


class Clock:
    """Seconds that were spent inside chosen functions, nested calls not counted twice."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the block."""
        self._depth += 1
        began = time.perf_counter()
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self.seconds += time.perf_counter() - began

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function whose calls are counted."""

        @functools.wraps(function)  # snap asks a method for the names of its arguments
        def timed(*given: Any, **options: Any) -> Any:
            with self.running():
                return function(*given, **options)

        return timed


def time_functions(clock: Clock, owner: Any, *names: str) -> None:
    """Count the calls of a module's or class's functions from here on."""
    for name in names:
        setattr(owner, name, clock.around(getattr(owner, name)))


def resident_peak() -> int:
    """Return the largest resident memory since the last reset, in bytes."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def reset_peak() -> None:
    """Begin to measure the largest resident memory anew (Linux, man 5 proc: clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def main() -> None:
    """Check the fixed cases and write the figures."""
    checkpoint, goldens, checkout, out = sys.argv[1:]
    from snapshot_tool import candidates
    from snapshot_tool.base.phases import Phase
    from snapshot_tool.base.protocol import SilentProgress
    from snapshot_tool.base.results import Verdict
    from snapshot_tool.check.request import CheckRequest
    from snapshot_tool.check.session import open_session

    candidates_own, snaps_own = Clock(), Clock()
    load = candidates.load_candidate

    def load_timed(*given: Any, **options: Any) -> Any:
        # Not before: torch and FMS are imported while the checkpoint is digested.
        from snapshot_tool.candidates import output_cache
        from snapshot_tool.candidates.fms import candidate as fms

        methods = ("preprocess", "vision", "connector", "forward", "generate")
        time_functions(candidates_own, fms.FmsCandidate, *methods)
        time_functions(candidates_own, fms, "_build_model")
        time_functions(snaps_own, output_cache, "_description", "_copied", "_joined")
        return load(*given, **options)

    candidates.load_candidate = load_timed

    request = CheckRequest(Path(goldens), checkpoint=checkpoint, fms_path=Path(checkout))
    golden = request.golden_choice.open()
    checker = open_session(request, golden, SilentProgress())
    model: Any = vars(checker.candidate)["_candidate"].model
    weights = sum(parameter.nbytes for parameter in model.parameters())
    runs: Counter[str] = Counter()

    def count(name: str, dimension: int) -> Any:
        def add(_module: Any, given: tuple[Any, ...], _options: Any) -> None:
            size = given[0].shape[dimension]
            runs[name] += size if name == "tiles" else size > 1

        return add

    tower = model.vision_tower.base_model.post_layernorm
    decoder = model.text_model.base_model.dec_norm
    tower.register_forward_pre_hook(count("tiles", 0), with_kwargs=True)
    decoder.register_forward_pre_hook(count("prompts", 1), with_kwargs=True)

    results, beyond, one_image = [], 0.0, Counter[str]()
    for case in golden.manifest.cases:
        runs["prompts"] = 0
        for phase in (phase for phase in Phase if phase in case.phases):
            reset_peak()
            results += checker.run(case, phase)
            if phase is Phase.VISION:
                beyond = max(beyond, (resident_peak() - weights) / 1e9)
        if not one_image:
            one_image = Counter(runs)
            tiles = golden.inputs(case.name).pixel_values
    checker.compare_weights()
    total = time.perf_counter() - BEGAN
    if {result.verdict for result in results} != {Verdict.PASS} or tiles is None:
        raise SystemExit("the check did not pass")
    own = candidates_own.seconds - snaps_own.seconds
    figures = {
        "outside": 1 - own / total,
        "seconds": total,
        "beyond": beyond,
        "encoded": one_image["tiles"] / len(tiles),
        "prompts": runs["prompts"],
    }
    Path(out).write_text(json.dumps(figures), encoding="utf-8")
    print(figures, f"{total:.1f} s, {candidates_own.seconds:.1f} s, {snaps_own.seconds:.1f} s")


if __name__ == "__main__":
    main()
