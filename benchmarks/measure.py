"""Measure time and memory of snap and of what it replaces; writes docs/performance.md.

usage: python -m benchmarks.measure     (`make bench` builds what it needs)

The live way loads both implementations into one process (benchmarks/live.py). Every process is
timed in turn with the one that it is compared with, so other work on the machine slows both.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from snapshot_tool.base.environment import describe_machine, package_versions
from snapshot_tool.goldens.find import find_goldens
from snapshot_tool.goldens.manifest import encode

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "performance.md"
BENCH = ROOT / "build" / "bench"
SNAP = str(Path(sys.executable).with_name("snap"))
CHECKOUT = ROOT / "build" / "fms-checkout"
LIVE_PACKAGES = ROOT / "build" / "live"  # transformers 4.57.6, over the check environment
TRUE_SHAPE = (BENCH / "true-shape", BENCH / "goldens")
EMBEDDED = (ROOT / "tests" / "checkpoints" / "tiny-idefics3", ROOT / "goldens")
ROUNDS = 15  # of short commands: runs on a shared machine differ by a third
SETS = 1000

HEAD = """# Performance

`make bench` writes this page, from one run on one machine: {processor}, {cores} cores, \
{memory:.0f} GiB of memory, torch {torch}.

A check runs all phases of the two fixed cases. "True shape" is SmolVLM-256M-Instruct with random \
weights. "Both live" is one process with transformers 4.57.6 and ibm-fms 1.13.1 that runs both \
models, phase by phase, like the parity suite. The embedded checkpoint is small: its time is \
mostly the import of torch and FMS.

| what | figure | target | met |
| --- | --- | --- | --- |
"""


@dataclass(frozen=True, slots=True)
class Row:
    """A figure, and the most that it may be; None: it has no target."""

    what: str
    figure: float
    target: float | None = None

    @property
    def met(self) -> bool:
        """Whether the figure is within its target."""
        return self.target is None or self.figure <= self.target

    def __str__(self) -> str:
        """Return the row of the page's table."""
        target = "" if self.target is None else f"at most {self.target:g}"
        met = "" if self.target is None else "yes" if self.met else "**no**"
        return f"| {self.what} | {self.figure:.3g} | {target} | {met} |"


@dataclass(frozen=True, slots=True)
class Cost:
    """Wall time in seconds, and the largest resident memory in bytes, of one process."""

    seconds: float
    peak: int


def run(command: Sequence[str], **environment: str) -> Cost:
    """Run a command in the repository; raise RuntimeError if it fails."""
    began = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, env={**os.environ, **environment}
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(f"exit code {process.returncode}: {' '.join(command)}")
    return Cost(seconds, usage.ru_maxrss * 1024)


def run_check(checkpoint: Path, goldens: Path) -> Cost:
    """Check the two fixed cases, all phases."""
    where = ["--checkpoint", str(checkpoint), "--goldens", str(goldens)]
    return run([SNAP, "check", "--fms-path", str(CHECKOUT), "--case", "*-image*", *where])


def run_live(checkpoint: Path) -> Cost:
    """Run both implementations side by side on the same cases."""
    command = [sys.executable, "benchmarks/live.py", str(checkpoint), str(CHECKOUT)]
    return run(command, PYTHONPATH=f"{LIVE_PACKAGES}:{ROOT}")


def measure_checks() -> Iterator[Row]:
    """Compare a check with both models live: once at true shape, often on the embedded one."""
    check, live = run_check(*TRUE_SHAPE), run_live(TRUE_SHAPE[0])
    yield Row("true shape: time relative to both live", check.seconds / live.seconds, 0.25)
    yield Row("true shape: peak memory relative to both live", check.peak / live.peak, 0.6)
    yield Row("true shape: check, seconds", check.seconds)
    yield Row("true shape: both live, seconds", live.seconds)
    yield Row("true shape: check, peak memory, GB", check.peak / 1e9)
    yield Row("true shape: both live, peak memory, GB", live.peak / 1e9)
    rounds = [(run_check(*EMBEDDED), run_live(EMBEDDED[0])) for _ in range(ROUNDS)]
    check_seconds = min(check.seconds for check, _ in rounds)
    live_seconds = min(live.seconds for _, live in rounds)
    yield Row("embedded checkpoint: time relative to both live", check_seconds / live_seconds, 0.7)
    yield Row("embedded checkpoint: check, seconds", check_seconds)
    yield Row("embedded checkpoint: both live, seconds", live_seconds)


def measure_sizes() -> Iterator[Row]:
    """Add up the golden set of the true shape, in both kinds of storage: three fixed cases."""
    for storage, goldens in (("full", BENCH / "goldens"), ("compact", BENCH / "compact")):
        size = sum(path.stat().st_size for path in goldens.glob("*/*/**/*") if path.is_file())
        yield Row(f"true shape: golden set of three cases, {storage}, MB", size / 1e6)


def measure_commands() -> Iterator[Row]:
    """Time the commands that import no torch."""
    click = [sys.executable, "-c", "import click"]
    rounds = [(run([SNAP, "--help"]), run(click)) for _ in range(ROUNDS)]
    seconds = min(snap.seconds for snap, _ in rounds)
    ratio = seconds / min(bare.seconds for _, bare in rounds)
    yield Row("`snap --help`: time, of `python -c 'import click'`", ratio, 1.5)
    (found,) = find_goldens(EMBEDDED[1])
    manifest = found.require_manifest()
    with tempfile.TemporaryDirectory(dir=BENCH) as root:
        for number in range(SETS):
            revision = f"{number:012x}" + "0" * 28
            entry = msgspec.structs.replace(manifest.checkpoint, revision=revision)
            copy = Path(root) / "local--tiny-idefics3" / revision[:12] / "cpu-float32"
            copy.mkdir(parents=True)
            text = encode(msgspec.structs.replace(manifest, checkpoint=entry))
            (copy / "manifest.json").write_bytes(text)
        seconds = min(run([SNAP, "list", "--goldens", root]).seconds for _ in range(3))
    yield Row(f"`snap list` of {SETS:,} sets, seconds", seconds, 3)


def main() -> int:
    """Measure, print and write the page; return 1 if a target is not met."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    head = HEAD.format(
        processor=describe_machine()["processor"],
        cores=os.cpu_count(),
        memory=memory,
        torch=package_versions()["torch"],
    )
    rows = []
    for measure in (measure_checks, measure_commands, measure_sizes):
        for row in measure():
            print(row, flush=True)
            rows.append(row)
    PAGE.write_text(head + "\n".join(map(str, rows)) + "\n", encoding="utf-8")
    return 0 if all(row.met for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
