"""What every benchmark is made of: processes that are timed in turn, and rows beside targets."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "build" / "bench"


@dataclass(frozen=True, slots=True)
class Row:
    """One figure, beside its target where there is one; `met` says whether it is met."""

    what: str
    figure: float
    target: str = ""
    met: bool = True


@dataclass(frozen=True, slots=True)
class Cost:
    """What one process took.

    Args:
        seconds: by the clock.
        peak: its largest resident memory in bytes.
        processor: seconds of processor time, which other work on the machine disturbs less.
    """

    seconds: float
    peak: int
    processor: float


def run_process(command: Sequence[str], *, code: int = 0, **environment: str) -> Cost:
    """Run a command in the repository; raise RuntimeError where it exits otherwise than by `code`.

    Its environment is this one's and what is given. Compiled modules are kept, as Python does where
    it was not told otherwise: compiling takes a tenth of a small check, and only of the first one.
    """
    inherited = {name: of for name, of in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    began = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, env={**inherited, **environment}
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != code:
        raise RuntimeError(f"exit code {process.returncode}: {' '.join(command)}")
    return Cost(seconds, usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime)


def best_seconds(commands: Mapping[str, Sequence[str]], *, rounds: int) -> dict[str, float]:
    """Return the shortest wall time of each command, run in turns."""
    best = dict.fromkeys(commands, float("inf"))
    for _ in range(rounds):
        for name, command in commands.items():
            best[name] = min(best[name], run_process(command).seconds)
    return best


def publish(part: str, title: str, rows: Sequence[Row], *, note: str = "") -> None:
    """Print a table, and keep it as build/bench/PART.json for the page."""
    text = table(title, [asdict(row) for row in rows], note)
    print(text)
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / f"{part}.json").write_text(
        json.dumps({"title": title, "note": note, "rows": [asdict(row) for row in rows]}, indent=2)
        + "\n",
        encoding="utf-8",
    )


def table(title: str, rows: Sequence[Mapping[str, object]], note: str) -> str:
    """Return a section of the page."""
    lines = [f"## {title}", ""]
    lines += [note, ""] if note else []
    lines += ["| what | figure | target | met |", "| --- | --- | --- | --- |"]
    for row in rows:
        met = ("yes" if row["met"] else "**no**") if row["target"] else ""
        lines.append(f"| {row['what']} | {row['figure']:.3g} | {row['target']} | {met} |")
    return "\n".join(lines) + "\n"
