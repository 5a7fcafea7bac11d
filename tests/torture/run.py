"""The long versions: `make torture` runs them and writes docs/reliability.md from their figures.

    python -m tests.torture.run PART …      each part leaves build/torture/PART.json

Parts: hostile, atheris, sharing, concurrency, load (check environment), recording, processes
(record environment), report (writes the page from the figures that are there).
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.conftest import ROOT

FIGURES = ROOT / "build" / "torture"
HOSTILE_INPUTS = 100_000
DRAWN_MANIFESTS = 5_000
_BATCH = 1_000
_EVERY_OTHER_KIND = 9  # each other kind of fault is tried at every ninth point that is killed

Figures = dict[str, Any]


def kill_points(makers: Sequence[Callable[[Path], Any]], *, every: int = 1) -> Figures:
    """Fail scenarios by kill -9, the first at every point and the others at every `every`-th.

    Each other kind of fault is tried at fewer points, spread over the whole run in the same way.
    """
    from tests.torture.kill_points import run_undisturbed, try_points
    from tests.torture.saboteur import Kind

    rows: list[Figures] = []
    failures: list[str] = []
    for make in makers:
        with TemporaryDirectory(dir=_memory_folder()) as folder:
            workplace = Path(folder)
            scenario = make(workplace / "start")
            whole = run_undisturbed(scenario, workplace)
            points = range(1, len(whole.operations) + 1)
            for kind in Kind:
                step = (every if rows else 1) if kind is Kind.KILL else _EVERY_OTHER_KIND * every
                chosen = points[::step]
                survival = try_points(scenario, whole, chosen, workplace / "tried", kind=kind)
                failures += survival.failures
                rows.append(
                    {
                        "scenario": scenario.name,
                        "fault": kind.value,
                        "points": survival.tried,
                        "of": len(points),
                        "survived": survival.tried - len(survival.failures),
                        "old": survival.found["old"],
                        "new": survival.found["new"],
                    }
                )
                _say(f"{scenario.name} {kind.value}: {rows[-1]}")
    return {"rows": rows, "failures": failures}


def recording() -> Figures:
    """Kill recordings, with the real reference's answers."""
    from tests.torture.scenarios import RECORDING

    return kill_points(RECORDING, every=3)


def sharing() -> Figures:
    """Kill pulls."""
    from tests.torture.scenarios import SHARING

    return kill_points(SHARING)


def hostile() -> Figures:
    """Try mutated sets, drawn manifests and bombs."""
    from tests.torture.bombs import BOMBS
    from tests.torture.trial import Outcome, run_batch, run_prepared

    total = Outcome()
    with TemporaryDirectory(dir=_memory_folder()) as folder:

        def try_batch(start: int) -> Outcome:
            return run_batch(range(start, start + _BATCH), Path(folder) / f"set-{start}")

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for outcome in pool.map(try_batch, range(0, HOSTILE_INPUTS, _BATCH)):
                total.add(outcome)
                _say(f"{total.inputs} mutated sets, {len(total.violations)} violations")
        mutated = total.inputs
        for start in range(0, DRAWN_MANIFESTS, _BATCH):
            total.add(_try_drawn_manifests(_BATCH, Path(folder) / "set", seed=start))
        drawn = total.inputs - mutated
        grown = total.grown
        for name, spoil in BOMBS.items():
            bomb = run_prepared(spoil, Path(folder) / "bomb", name=name)
            _say(f"{name}: {bomb.grown / 1e6:.0f} MB")
            total.add(bomb)
    return {
        "mutated": mutated,
        "drawn": drawn,
        "bombs": len(BOMBS),
        "runs": total.runs,
        "codes": dict(total.codes),
        "mutations": dict(total.mutations),
        "memory_mb": round(grown / 1e6),
        "bomb_memory_mb": round(total.grown / 1e6),
        "failures": total.violations,
    }


def _try_drawn_manifests(count: int, workplace: Path, *, seed: int) -> Any:
    import hypothesis
    from hypothesis import HealthCheck, Phase, given, settings

    from snapshot_tool.store.manifest import Manifest, encode
    from tests.torture.schema import manifests
    from tests.torture.trial import run_batch

    drawn: list[bytes] = []

    @hypothesis.seed(seed)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(manifests())
    def draw(manifest: Manifest) -> None:
        drawn.append(encode(manifest))

    draw()

    def put(folder: Path, index: int) -> str:
        (folder / "manifest.json").unlink()
        (folder / "manifest.json").write_bytes(drawn[index])
        return "drawn from the schema"

    return run_batch(range(len(drawn)), workplace, mutate=put)


PARTS: dict[str, Callable[[], Figures]] = {
    "hostile": hostile,
    "sharing": sharing,
    "recording": recording,
}


def _memory_folder() -> str | None:
    """Return a folder in memory, where there is one with room: nothing here needs a disk."""
    shared = Path("/dev/shm")
    return str(shared) if shared.is_dir() and shutil.disk_usage(shared).free > 2**30 else None


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(names: Sequence[str]) -> int:
    """Run parts and keep their figures; return 1 where something did not survive."""
    import torch

    torch.set_num_threads(1)  # processes are forked
    random.seed(0)
    FIGURES.mkdir(parents=True, exist_ok=True)
    failed = False
    for name in names:
        began = time.monotonic()
        figures = PARTS[name]()
        figures |= {"seconds": round(time.monotonic() - began), "python": sys.version.split()[0]}
        text = json.dumps(figures, indent=2, sort_keys=True)
        (FIGURES / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        for failure in figures["failures"][:20]:
            _say(failure)
        failed = failed or bool(figures["failures"])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
