"""What the commands cost that run no model: help, list, verify. Whole processes, best of many.

Each is timed in turn with its yardstick, so that whatever else the machine does hits both.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import msgspec

from benchmarks.figures import OUT, ROOT, Row, best_seconds, publish
from snapshot_tool.goldens.find import find_goldens
from snapshot_tool.goldens.layout import OUTPUTS
from snapshot_tool.goldens.manifest import Manifest, encode
from snapshot_tool.goldens.tensors import Span, describe_file, write_file

SNAP = [str(Path(sys.executable).with_name("snap"))]
SETS = (10, 100, 1000)
LARGE = 2**30  # bytes of the file that is verified
ROUNDS = 15


def embedded() -> tuple[Path, Manifest]:
    """Return the committed golden set."""
    (found,) = find_goldens(ROOT / "goldens")
    return found.folder, found.require_manifest()


def write_many(root: Path, count: int) -> None:
    """Write the manifests of as many golden sets, each as large as the committed one's."""
    _, manifest = embedded()
    for number in range(count):
        revision = f"{number:012x}" + "0" * 28
        entry = msgspec.structs.replace(manifest.checkpoint, revision=revision)
        folder = root / "local--tiny-idefics3" / revision[:12] / "cpu-float32"
        folder.mkdir(parents=True)
        text = encode(msgspec.structs.replace(manifest, checkpoint=entry))
        (folder / "manifest.json").write_bytes(text)


def write_large(root: Path) -> Path:
    """Write the committed set with one large file in it, of eight tensors; return that file."""
    source, manifest = embedded()
    folder = root / source.relative_to(ROOT / "goldens")
    shutil.copytree(source.parent, folder.parent)
    side = LARGE // 8 // 4
    span = Span("F32", (side,), 0, LARGE // 8)
    zeros = root / "zeros"
    with zeros.open("wb") as file:
        file.truncate(LARGE // 8)
    case = manifest.cases[0].name
    write_file(folder / OUTPUTS, [(f"{case}/module.{i}", zeros, span) for i in range(8)])
    files = {**manifest.files, OUTPUTS: describe_file(folder / OUTPUTS)}
    (folder / "manifest.json").write_bytes(encode(msgspec.structs.replace(manifest, files=files)))
    return folder / OUTPUTS


def measure_help() -> Row:
    """Compare `snap --help` with what importing click takes."""
    click = [sys.executable, "-c", "import click"]
    best = best_seconds({"help": [*SNAP, "--help"], "click": click}, rounds=ROUNDS)
    ratio = best["help"] / best["click"]
    return Row("`snap --help`, of `python -c 'import click'`", ratio, "at most 1.5", ratio <= 1.5)


def measure_list(root: Path) -> list[Row]:
    """Time `snap list` as the sets grow in number."""
    commands = {}
    for count in SETS:
        write_many(root / str(count), count)
        commands[str(count)] = [*SNAP, "list", "--goldens", str(root / str(count))]
    best = best_seconds(commands, rounds=ROUNDS // 3)
    rows = [Row(f"`snap list` of {n} sets, seconds", best[str(n)], "", True) for n in SETS[:-1]]
    last = best[str(SETS[-1])]
    return [*rows, Row(f"`snap list` of {SETS[-1]:,} sets, seconds", last, "at most 3", last <= 3)]


def measure_verify(root: Path) -> Row:
    """Compare the speed of `snap verify` with that of sha256sum on the set's largest file."""
    large = write_large(root)
    commands = {
        "verify": [*SNAP, "verify", "--goldens", str(root)],
        "sha256sum": ["sha256sum", str(large)],
    }
    best = best_seconds(commands, rounds=ROUNDS // 3)
    ratio = best["sha256sum"] / best["verify"]
    what = f"`snap verify` of {LARGE >> 20} MiB, speed, of `sha256sum`"
    return Row(what, ratio, "at least 0.8", ratio >= 0.8)


def main() -> None:
    """Measure, print a table, write build/bench/commands.json."""
    OUT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=OUT) as folder:
        root = Path(folder)
        rows = [measure_help(), *measure_list(root / "many"), measure_verify(root / "large")]
    publish("commands", "Commands that run no model", rows)


if __name__ == "__main__":
    main()
