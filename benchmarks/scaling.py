"""What record, check, list and verify cost as the cases of a golden set grow: time and memory.

Whole processes, each measured by the system: processor time, which other work on the machine
disturbs less than the clock, and peak memory. The checkpoint is tiny (a llama of 0.1 M parameters),
so what is seen is what a case costs beside the model.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.commands import SNAP
from benchmarks.figures import OUT, ROOT, Cost, Row, publish, run_process

COUNTS = (10, 100, 1000)
FIXED_CASES = 3  # of a checkpoint without images, end-token included; the others are variants
CHECKPOINT = ("--checkpoint", "tests/families/checkpoints/llama")
RECORD = [str(ROOT / ".venv-record" / "bin" / "snap"), "record", *CHECKPOINT]
CHECK = [*SNAP, "check", *CHECKPOINT, "--json", os.devnull]
LINEAR = 1.3  # how much dearer a case may be among a thousand than among a hundred
NOTHING = 0.5  # seconds that are mostly the process's start
NOISE = 0.1  # seconds by which two runs of a process may differ
FLAT = 64  # KB that a further case may take: its part of the manifest and of the report
TITLE = "Growth with the number of cases"
NOTE = (
    "A tiny llama; processor time on one thread, whole processes. Memory grows by each case's "
    "entries in the manifest and by the figures of its results: [scale.md](scale.md)."
)


@dataclass(frozen=True, slots=True)
class Growth:
    """How a command's cost grows over COUNTS."""

    command: str
    costs: Sequence[Cost]

    @property
    def seconds(self) -> tuple[float, float]:
        """Processor seconds for each further case, up to a hundred and up to a thousand."""
        few, more, many = (cost.processor for cost in self.costs)
        return (more - few) / (COUNTS[1] - COUNTS[0]), (many - more) / (COUNTS[2] - COUNTS[1])

    @property
    def kilobytes(self) -> float:
        """Memory for each further case."""
        return (self.costs[-1].peak - self.costs[0].peak) / 1024 / (COUNTS[-1] - COUNTS[0])

    @property
    def ratio(self) -> float | None:
        """How much dearer a case is among a thousand; None where all of them take no time.

        Where a hundred take less than the noise, it is told of the noise.
        """
        few, many = self.seconds
        seen = max(few, NOISE / (COUNTS[1] - COUNTS[0]))
        return many / seen if many * COUNTS[-1] > NOTHING else None

    def rows(self) -> Iterator[Row]:
        """Yield the figures beside their targets."""
        if self.ratio is not None:
            what = f"`snap {self.command}`, a case among {COUNTS[2]:,}, of one among {COUNTS[1]}"
            yield Row(what, self.ratio, f"at most {LINEAR}", self.ratio <= LINEAR)
        what = f"`snap {self.command}`, KB of memory for a further case"
        yield Row(what, self.kilobytes, f"at most {FLAT}", self.kilobytes <= FLAT)

    def line(self) -> str:
        """Return the command's row of the table in docs/scale.md."""
        costs = (f"{cost.processor:.2f} s, {cost.peak / 2**20:.0f} MB" for cost in self.costs)
        further = f"{max(0, self.seconds[1]) * 1000:.3g} ms, {self.kilobytes:.0f} KB"
        ratio = f"{self.ratio:.2f}x" if self.ratio else "too quick to tell"
        return f"| `snap {self.command}` | {' | '.join(costs)} | {further} | {ratio} |"


def measure_all() -> list[Growth]:
    """Record, check, list and verify golden sets of growing size."""
    folder = OUT / "scaling"
    shutil.rmtree(folder, ignore_errors=True)
    costs: dict[str, list[Cost]] = {}
    for count in COUNTS:
        goldens = ("--goldens", str(folder / str(count)))
        variants = ("--variants", str(count - FIXED_CASES))
        commands = {
            "record": [*RECORD, *variants, *goldens],
            "check": [*CHECK, *goldens],
            "list": [*SNAP, "list", *goldens],
            "verify": [*SNAP, "verify", *goldens],
        }
        for name, command in commands.items():
            cost = run_process(command, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
            costs.setdefault(name, []).append(cost)
    shutil.rmtree(folder)
    return [Growth(name, growing) for name, growing in costs.items()]


def main() -> None:
    """Measure, print the tables, write build/bench/scaling.json."""
    growths = measure_all()
    counts = " | ".join(f"{count:,} cases" for count in COUNTS)
    print(f"| command | {counts} | a further case | of that among {COUNTS[1]} |")
    print("| --- |" + " --- |" * (len(COUNTS) + 2))
    for growth in growths:
        print(growth.line())
    publish("scaling", TITLE, [row for growth in growths for row in growth.rows()], note=NOTE)


if __name__ == "__main__":
    main()
