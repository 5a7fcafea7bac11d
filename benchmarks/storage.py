"""What a case takes on disk at the true shapes of SmolVLM-256M, in both kinds of golden set.

usage: python -m benchmarks.storage     (needs build/bench/true-shape and the record environment)
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.figures import OUT, ROOT, Row, publish, run_process
from snapshot_tool.store.layout import find_set_folders
from snapshot_tool.store.manifest import Manifest, load_manifest
from snapshot_tool.store.tensors import read_header
from snapshot_tool.store.verify import set_file

CHECKPOINT = OUT / "true-shape"
SETS = {"full": OUT / "goldens", "compact": OUT / "compact"}
RECORD = ROOT / ".venv-record" / "bin" / "snap"
TARGET = 3.0  # MB


def recorded(storage: str) -> tuple[Path, Manifest]:
    """Return the set of the two fixed cases, recorded now where it is not there yet."""
    goldens = SETS[storage]
    if not find_set_folders(goldens):
        options = ("--variants", "0", "--storage", storage, "--goldens", str(goldens))
        run_process([str(RECORD), "record", "--checkpoint", str(CHECKPOINT), *options])
    (folder,) = find_set_folders(goldens)
    return folder, load_manifest(folder)


def megabytes(storage: str) -> dict[str, float]:
    """Return what each case takes, its share of the manifest included."""
    folder, manifest = recorded(storage)
    cases = {case.name: 0 for case in manifest.cases}
    for file in manifest.files:
        for key, span in read_header(set_file(folder, file)).items():
            cases[key.partition("/")[0]] += span.end - span.start
    share = (folder / "manifest.json").stat().st_size / len(cases)
    return {case: (size + share) / 1e6 for case, size in cases.items()}


def main() -> None:
    """Measure, print, keep the figures."""
    rows = []
    for case, size in megabytes("compact").items():
        what = f"{case}, compact, MB"
        rows.append(Row(what, size, f"at most {TARGET:g}", met=size <= TARGET))
    rows += [Row(f"{case}, full, MB", size) for case, size in megabytes("full").items()]
    publish("storage", "A case on disk, true shape", rows)


if __name__ == "__main__":
    main()
