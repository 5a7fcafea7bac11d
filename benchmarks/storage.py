"""What a case takes on disk at the true shapes of SmolVLM-256M, in both kinds of golden set.

usage: python -m benchmarks.storage     (needs build/bench/true-shape and the record environment)
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.figures import OUT, ROOT, Row, publish, run_process
from snapshot_tool.goldens.layout import find_set_folders
from snapshot_tool.goldens.manifest import Manifest, load_manifest
from snapshot_tool.goldens.tensors import read_header
from snapshot_tool.goldens.verify import set_file

CHECKPOINT = OUT / "true-shape"
SETS = {"full": OUT / "goldens", "compact": OUT / "compact"}
RECORD = ROOT / ".venv-record" / "bin"
TARGET = 3.0  # MB


def recorded(storage: str) -> tuple[Path, Manifest]:
    """Return the set of the two fixed cases, recorded now where it is not there yet."""
    goldens = SETS[storage]
    if not find_set_folders(goldens):
        options = ("--variants", "0", "--storage", storage, "--goldens", str(goldens))
        run_process([str(RECORD / "snap"), "record", "--checkpoint", str(CHECKPOINT), *options])
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


def megabytes_of_noise() -> dict[str, float]:
    """Return what an image of noise and its tiles take: the tiles made again, and as PNG."""
    path = OUT / "noise.json"
    run_process([str(RECORD / "python"), "-m", "benchmarks.noise", str(CHECKPOINT), str(path)])
    sizes: dict[str, int] = json.loads(path.read_text(encoding="utf-8"))
    return {way: size / 1e6 for way, size in sizes.items()}


def main() -> None:
    """Measure, print, keep the figures."""
    compact, full, noise = megabytes("compact"), megabytes("full"), megabytes_of_noise()
    one, two = compact.values()
    # Not recorded: variants have three images at most, of 160 pixels a side.
    further = two - one
    small = {
        **{f"{case}, compact, MB": size for case, size in compact.items()},
        "three images, by what the second one adds, compact, MB": two + further,
        "one-image with an image of noise in place of its own, compact, MB": one + noise["cuts"],
    }
    rows = [
        Row(what, size, f"at most {TARGET:g}", met=size <= TARGET) for what, size in small.items()
    ]
    rows += [Row(f"{case}, full, MB", size) for case, size in full.items()]
    rows += [
        Row("an image of noise and its tiles, compact, MB", noise["cuts"]),
        Row("the same where its tiles could not be made again, MB", noise["png"]),
    ]
    publish(
        "storage",
        "A case on disk, true shape",
        rows,
        note="The fixed cases' images are gradients. Noise is what PNG makes least of: its tiles "
        "are made again from the image, which takes most of what is left.",
    )


if __name__ == "__main__":
    main()
