"""The long versions: `make torture` runs them and writes docs/reliability.md from their figures.

    python -m tests.torture.run PART …      each part leaves build/torture/PART.json

Parts: hostile, atheris, sharing, sharing-refused, concurrency, load (check environment), recording,
recording-refused, processes, recorders (record environment), report (writes the page).
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.conftest import ROOT

FIGURES = ROOT / "build" / "torture"
FUZZ_RUNS = 50_000
CHECKERS = 20
GRADES = 30  # from nothing to more than enough
CASES = 1_000
FLAT = 30  # MB
REAL_PROCESSES = 24
UPDATES = 6
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


def refusals(makers: Sequence[Callable[[Path], Any]], *, grades: int) -> Figures:
    """Run scenarios where the system itself refuses, in so many grades of each surrounding."""
    from tests.torture.kill_points import run_undisturbed
    from tests.torture.namespaces import MountRefusedError
    from tests.torture.surroundings import SURROUNDINGS, try_surrounding

    rows: list[Figures] = []
    failures: list[str] = []
    for make in makers:
        with TemporaryDirectory(dir=_memory_folder()) as folder:
            workplace = Path(folder)
            scenario = make(workplace / "start")
            whole = run_undisturbed(scenario, workplace)
            for name in SURROUNDINGS:
                row = {"scenario": scenario.name, "surrounding": name}
                try:
                    tried = try_surrounding(
                        name, scenario, whole, workplace / "tried", count=grades
                    )
                except MountRefusedError as refused:
                    failures.append(f"{scenario.name}, {name}: not tried, {refused}")
                    continue
                failures += tried.failures
                counts = {"tried": tried.tried, "refused": tried.refused}
                rows.append({**row, **counts, "completed": tried.completed})
                _say(str(rows[-1]))
    return {"rows": rows, "failures": failures}


def recording_refused() -> Figures:
    """Record on full and read-only disks, and under limits of files."""
    from tests.torture.scenarios import RECORDING

    return refusals(RECORDING, grades=GRADES)


def sharing_refused() -> Figures:
    """Pull on full and read-only disks, and under limits of files."""
    from tests.torture.scenarios import SHARING

    return refusals(SHARING, grades=GRADES)


def recording() -> Figures:
    """Kill recordings, with the real reference's answers."""
    from tests.torture.scenarios import RECORDING

    return kill_points(RECORDING, every=3)


def sharing() -> Figures:
    """Kill pulls."""
    from tests.torture.scenarios import SHARING

    return kill_points(SHARING)


def hostile() -> Figures:
    """Try mutated sets, drawn manifests, configurations and bombs."""
    from tests.torture.hostile import try_hostile_sets

    with TemporaryDirectory(dir=_memory_folder()) as folder:
        return try_hostile_sets(FIGURES / "hostile", Path(folder))


def atheris() -> Figures:
    """Fuzz the parsers of manifests and headers with coverage, in a process of their own."""
    rows: list[Figures] = []
    failures: list[str] = []
    for parser in ("manifest", "header"):
        command = [sys.executable, "-m", "tests.torture.fuzz", parser, str(FUZZ_RUNS)]
        answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if answer.returncode != 0:
            failures.append(f"{parser}: {answer.stderr[-1500:]}")
        rows.append({"parser": parser, "runs": FUZZ_RUNS if answer.returncode == 0 else 0})
        _say(str(rows[-1]))
    return {"rows": rows, "failures": failures}


def concurrency() -> Figures:
    """Let a recorder replace a set under its readers; let twenty checkers run at once."""
    from tests.torture.concurrency import check_at_once, meet

    rows: list[Figures] = []
    failures: list[str] = []
    for way in ("exchange", "renames"):
        with TemporaryDirectory(dir=_memory_folder()) as folder:
            meeting = meet(Path(folder), readers=4, rounds=400, way=way)
        failures += meeting.failures
        row = {"way": way, "readers": 4, "replaced": meeting.replaced, "reads": meeting.reads}
        rows.append(row)
        _say(str(row))
    codes = check_at_once(CHECKERS)
    failures += [f"a checker ended with {code}" for code in codes if code != 0]
    return {"rows": rows, "checkers": len(codes), "failures": failures}


def load() -> Figures:
    """Check a thousand cases and watch the memory."""
    from tests.torture.load import check_under_load, multiply_golden

    phases = ("--phase", "vision", "--phase", "connector", "--phase", "forward")
    with TemporaryDirectory() as folder:
        multiply_golden(Path(folder), cases=CASES)
        whole = check_under_load(Path(folder) / "goldens", cases=CASES, options=phases)
    failures = [] if whole.code == 0 else [whole.said[-900:]]
    if whole.growth > FLAT:
        failures.append(f"memory grew by {whole.growth:.0f} MB")
    return {
        "cases": CASES,
        "check_seconds": round(whole.seconds),
        "peak_mb": round(max(whole.memory)),
        "growth_mb": round(whole.growth, 1),
        "failures": failures,
    }


def processes() -> Figures:
    """Kill whole `snap record` processes, with the model loaded and asked in each."""
    from tests.torture.processes import kill_real_recordings

    return kill_real_recordings(REAL_PROCESSES)


def recorders() -> Figures:
    """Let two live recorders at a time replace a set under its readers."""
    from tests.torture.recorders import record_beside_readers

    return record_beside_readers(UPDATES)


def report() -> Figures:
    """Write docs/reliability.md from the figures of the other parts."""
    from tests.torture.page import page

    figures = {path.stem: json.loads(path.read_text("utf-8")) for path in FIGURES.glob("*.json")}
    figures.pop("report", None)
    (ROOT / "docs" / "reliability.md").write_text(page(figures), encoding="utf-8")
    return {"failures": []}


PARTS: dict[str, Callable[[], Figures]] = {
    "hostile": hostile,
    "sharing": sharing,
    "sharing-refused": sharing_refused,
    "recording": recording,
    "recording-refused": recording_refused,
    "atheris": atheris,
    "concurrency": concurrency,
    "load": load,
    "processes": processes,
    "recorders": recorders,
    "report": report,
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
