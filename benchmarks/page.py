"""Writes docs/performance.md from the figures that the benchmarks left in build/bench."""

from __future__ import annotations

import json
import os
import sys

from benchmarks.figures import OUT, ROOT, table
from snapshot_tool.base.environment import describe_machine, package_versions

PARTS = ("check", "quick", "compare", "commands", "storage", "scaling")
PAGE = ROOT / "docs" / "performance.md"

_HEAD = """# Performance

Written by `make bench` from `benchmarks/`, never by hand. Figures are ratios, or seconds, of one \
run on one machine: {machine}, {cores} cores, {memory:.0f} GiB of memory, torch {torch}. Only what \
was measured in the same run is compared. Every process finds its modules compiled, which Python \
keeps unless it is told otherwise.
"""


def main() -> int:
    """Write the page; a part that was not run is said to be missing, and the exit code is 1."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    sections = [
        _HEAD.format(
            machine=describe_machine()["processor"],
            cores=os.cpu_count(),
            memory=memory,
            torch=package_versions()["torch"],
        )
    ]
    missing = []
    for part in PARTS:
        path = OUT / f"{part}.json"
        if not path.exists():
            missing.append(part)
            sections.append(f"## {part}\n\nNot run.\n")
            continue
        figures = json.loads(path.read_text(encoding="utf-8"))
        sections.append(table(figures["title"], figures["rows"], figures["note"]))
    PAGE.write_text("\n".join(sections), encoding="utf-8")
    print(f"written: {PAGE.relative_to(ROOT)}")
    if missing:
        print(f"not run: {', '.join(missing)}", file=sys.stderr)
    return bool(missing)


if __name__ == "__main__":
    sys.exit(main())
