"""What record, check, list and verify cost as the cases of a golden set grow: time and memory.

Whole processes, each measured by the system: processor time, which other work on the machine
disturbs less than the clock, and peak memory. The checkpoint is tiny (a llama of 0.1 M parameters),
so what is seen is what a case costs beside the model.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.commands import OUT, ROOT, SNAP

COUNTS = (10, 100, 1000)
FIXED_CASES = 2  # of a checkpoint without images; the others are variants
CHECKPOINT = ("--checkpoint", "tests/families/checkpoints/llama")
RECORD = [str(ROOT / ".venv-record" / "bin" / "snap"), "record", *CHECKPOINT]
CHECK = [*SNAP, "check", *CHECKPOINT, "--json", os.devnull]
LINEAR = 1.3  # how much dearer a case may be among a thousand than among a hundred
NOTHING = 0.5  # seconds that are mostly the process's start
FLAT = 64  # KB that a further case may take: its part of the manifest and of the report


@dataclass(frozen=True, slots=True)
class Cost:
    """What one process took: processor seconds and MB at its peak."""

    command: str
    cases: int
    seconds: float
    memory: float


@dataclass(frozen=True, slots=True)
class Growth:
    """How a command's cost grows.

    Args:
        seconds: processor seconds for each further case, among a hundred and among a thousand.
        memory: KB for each further case.
    """

    command: str
    costs: tuple[Cost, ...]
    seconds: tuple[float, float]
    memory: float

    @property
    def ratio(self) -> float | None:
        """How much dearer a case is among a thousand; None where all of them take no time."""
        few, many = self.seconds
        return many / few if few > 0 and many * COUNTS[-1] > NOTHING else None

    @property
    def met(self) -> bool:
        """Whether it is linear in time and flat in memory."""
        return (self.ratio or 1) <= LINEAR and self.memory <= FLAT


def measure(command: Sequence[str], *, name: str, cases: int) -> Cost:
    """Run a command on one thread and return what it took; raise where it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, list(command))
    return Cost(name, cases, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)


def measure_all(folder: Path) -> Iterator[Cost]:
    """Record, check, list and verify golden sets of growing size below a folder."""
    for count in COUNTS:
        goldens = ("--goldens", str(folder / str(count)))
        variants = ("--variants", str(count - FIXED_CASES))
        yield measure([*RECORD, *variants, *goldens], name="record", cases=count)
        yield measure([*CHECK, *goldens], name="check", cases=count)
        for name in ("list", "verify"):
            yield measure([*SNAP, name, *goldens], name=name, cases=count)


def growth(costs: Sequence[Cost]) -> Growth:
    """Return how the cost of one command grows from count to count."""
    few, more, many = costs
    early = (more.seconds - few.seconds) / (more.cases - few.cases)
    late = (many.seconds - more.seconds) / (many.cases - more.cases)
    memory = (many.memory - few.memory) * 1024 / (many.cases - few.cases)
    return Growth(few.command, tuple(costs), (early, late), memory)


def table(growths: Sequence[Growth]) -> list[str]:
    """Return the figures as a table in Markdown."""
    counts = " | ".join(f"{count:,} cases" for count in COUNTS)
    lines = [
        f"| command | {counts} | a further case | of that among {COUNTS[1]} | as targeted |",
        "| --- |" + " --- |" * (len(COUNTS) + 3),
    ]
    for one in growths:
        figures = " | ".join(f"{cost.seconds:.2f} s, {cost.memory:.0f} MB" for cost in one.costs)
        further = f"{max(0, one.seconds[1]) * 1000:.2g} ms, {one.memory:.0f} KB"
        ratio = f"{one.ratio:.2f}x" if one.ratio else "too quick to tell"
        verdict = "yes" if one.met else "**no**"
        lines.append(f"| `snap {one.command}` | {figures} | {further} | {ratio} | {verdict} |")
    return lines


def main() -> int:
    """Measure, write build/bench/scaling.json, and print the table; 1 where a target is missed."""
    folder = OUT / "scaling"
    shutil.rmtree(folder, ignore_errors=True)
    costs = list(measure_all(folder))
    names = dict.fromkeys(cost.command for cost in costs)
    growths = [growth([cost for cost in costs if cost.command == name]) for name in names]
    found = [{**asdict(one), "ratio": one.ratio, "met": one.met} for one in growths]
    (OUT / "scaling.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print("\n".join(table(growths)))
    shutil.rmtree(folder)
    return 0 if all(one.met for one in growths) else 1


if __name__ == "__main__":
    sys.exit(main())
