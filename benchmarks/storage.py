"""What a case takes on disk at the true shapes of SmolVLM-256M, in both kinds of golden set.

usage: python -m benchmarks.storage     (needs build/bench/true-shape and the record environment)
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.figures import OUT, ROOT, Row, publish, run_process
from snapshot_tool.goldens.find import find_goldens
from snapshot_tool.goldens.manifest import Manifest
from snapshot_tool.goldens.tensors import read_header
from snapshot_tool.goldens.verify import set_file

CHECKPOINT = OUT / "true-shape"
SETS = {"full": OUT / "goldens", "compact": OUT / "compact"}
RECORD = ROOT / ".venv-record" / "bin"
TARGET = 3.0  # MB


def recorded(storage: str) -> tuple[Path, Manifest]:
    """Return the set of the two fixed cases, recorded now where it is not there yet."""
    goldens = SETS[storage]
    if not find_goldens(goldens):
        options = ("--variants", "0", "--storage", storage, "--goldens", str(goldens))
        run_process([str(RECORD / "snap"), "record", "--checkpoint", str(CHECKPOINT), *options])
    (found,) = find_goldens(goldens)
    return found.folder, found.require_manifest()


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
    compact, full = megabytes("compact"), megabytes("full")
    one, two = compact.values()
    # Not recorded: variants have three images at most, of 160 pixels a side.
    further = two - one
    small = {
        **{f"{case}, compact, MB": size for case, size in compact.items()},
        "three images, by what the second one adds, compact, MB": two + further,
    }
    rows = [
        Row(what, size, f"at most {TARGET:g}", met=size <= TARGET) for what, size in small.items()
    ]
    rows += [Row(f"{case}, full, MB", size) for case, size in full.items()]
    note = "The fixed cases' images are gradients. Tiles of noise take ten times as much as PNG."
    publish("storage", "A case on disk, true shape", rows, note=note)


if __name__ == "__main__":
    main()
