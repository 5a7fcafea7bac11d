"""A check of a thousand cases, and checks under a limit of memory: real `snap` processes.

The thousand cases are the committed golden's, under new names: the same tensors, as often as
needed, so that every one of them passes. What is measured is whether memory grows with them.
"""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from snapshot_tool.goldens.layout import INPUTS
from snapshot_tool.goldens.manifest import encode, load_manifest
from snapshot_tool.goldens.tensors import describe_file, join_files
from tests.conftest import CHECKOUT, CHECKPOINT, GOLDENS, ROOT, set_folder


@dataclass(frozen=True, slots=True)
class Load:
    """A finished check: exit code, cases, seconds, and resident memory over time in MB."""

    code: int
    cases: int
    seconds: float
    memory: tuple[float, ...]
    said: str

    @property
    def growth(self) -> float:
        """How much more memory the last quarter of the run held than its first half, in MB."""
        count = len(self.memory)
        return max(self.memory[3 * count // 4 :]) - max(self.memory[: count // 2])


def multiply_golden(root: Path, *, cases: int) -> Path:
    """Write a golden set with `cases` copies of the golden's smallest cases; return its folder."""
    folder = set_folder(GOLDENS)
    manifest = load_manifest(folder)
    chosen = sorted((c for c in manifest.cases if c.tiles), key=lambda case: case.tokens)[:4]
    place = root / "goldens" / folder.relative_to(GOLDENS)
    place.mkdir(parents=True)
    files = {}
    for name in manifest.files:
        source = folder.parent / name if name == INPUTS else folder / name
        target = place.parent / name if name == INPUTS else place / name
        parts = _split(source, root / "parts", [case.name for case in chosen])
        copies = {f"copy-{i:05}": parts[i % len(chosen)] for i in range(cases)}
        join_files({case: part for case, part in copies.items() if part.exists()}, target)
        files[name] = describe_file(target)
    entries = tuple(
        msgspec.structs.replace(chosen[i % len(chosen)], name=f"copy-{i:05}") for i in range(cases)
    )
    many = msgspec.structs.replace(manifest, cases=entries, files=files)
    (place / "manifest.json").write_bytes(encode(many))
    checkpoint = root / CHECKPOINT.relative_to(ROOT)
    if not checkpoint.exists():
        shutil.copytree(CHECKPOINT, checkpoint)
    return place


def _split(source: Path, parts: Path, cases: list[str]) -> list[Path]:
    """Write each case's tensors of a file as a file of its own."""
    from safetensors.torch import load_file, save_file

    parts.mkdir(exist_ok=True)
    tensors = load_file(source)
    paths = []
    for case in cases:
        own = {k.partition("/")[2]: v for k, v in tensors.items() if k.startswith(f"{case}/")}
        paths.append(parts / f"{case}-{source.name}")
        if own:
            save_file(own, paths[-1])
    return paths


def check_under_load(goldens: Path, *, cases: int, options: tuple[str, ...] = ()) -> Load:
    """Run a real check and watch its memory."""
    began = time.monotonic()
    command = [sys.executable, "-m", "snapshot_tool", "check", "--fms-path", str(CHECKOUT)]
    with subprocess.Popen(
        [*command, "--goldens", str(goldens), *options],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        memory: list[float] = []
        watcher = threading.Thread(target=_watch, args=(process, memory))
        watcher.start()
        said, _ = process.communicate()
        watcher.join()
    return Load(process.returncode, cases, time.monotonic() - began, tuple(memory), said)


def _watch(process: subprocess.Popen[Any], memory: list[float]) -> None:
    path = Path(f"/proc/{process.pid}/statm")
    page = resource.getpagesize()
    while process.poll() is None:
        try:
            fields = path.read_text(encoding="ascii").split()
        except OSError:
            return
        if len(fields) > 2:
            # Resident but not shared: mapped files come and go as the system likes.
            memory.append((int(fields[1]) - int(fields[2])) * page / 1e6)
        time.sleep(0.1)
