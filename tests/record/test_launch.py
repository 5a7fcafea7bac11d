"""Recording by several processes, and with a reference that lies partly on disk.

By bytes: what comes of it is what one process records.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from snapshot_tool.base.errors import UsageError
from snapshot_tool.record.request import RecordRequest
from tests.conftest import ROOT, Snap, error_lines

pytestmark = pytest.mark.record
CHECKPOINT = ROOT / "tests" / "families" / "checkpoints" / "llama"
OPTIONS = ("record", "--checkpoint", CHECKPOINT, "--variants", "2", "--oracle")


@pytest.fixture(scope="module", autouse=True)
def one_thread_and_one_date() -> Iterator[None]:
    """Have what launched processes have: sums over several threads' parts round differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with mock.patch.dict(os.environ, SOURCE_DATE_EPOCH="1700000000"):
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def recorded(snap: Snap, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Record in one process."""
    goldens = tmp_path_factory.mktemp("one") / "goldens"
    assert snap(*OPTIONS, "--goldens", goldens).code == 0
    return files(goldens)


def files(goldens: Path) -> dict[str, bytes]:
    """Return the bytes of every file of a golden set."""
    found = (path for path in goldens.glob("local--*/**/*") if path.is_file())
    return {str(path.relative_to(goldens)): path.read_bytes() for path in found}


def launch(goldens: Path, *, module: str = "snapshot_tool") -> subprocess.CompletedProcess[str]:
    """Record in two processes of `accelerate launch`, each on the CPU."""
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"),
        *("--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"),
        *("--dynamo_backend", "no", "-m", module, *map(str, OPTIONS), "--goldens", str(goldens)),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=200
    )


def test_two_processes_write_the_bytes_of_one(recorded: dict[str, bytes], tmp_path: Path) -> None:
    """Manifest and oracle included; the first process alone reports."""
    answer = launch(tmp_path / "goldens")
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.count("recorded ") == 1
    assert files(tmp_path / "goldens") == recorded


def test_a_killed_process_leaves_a_recording_to_go_on_with(
    snap: Snap, recorded: dict[str, bytes], tmp_path: Path
) -> None:
    """By as many processes as one likes; the parts of the dead one are asked again."""
    goldens = tmp_path / "goldens"
    assert launch(goldens, module="tests.record.dying_rank").returncode != 0
    assert not files(goldens)
    assert list(goldens.glob(".snap/**/parts/*/forward.safetensors"))
    assert snap(*OPTIONS, "--goldens", goldens, "--resume").code == 0
    assert files(goldens) == recorded


def test_a_reference_that_lies_partly_on_disk_answers_with_the_same_bytes(
    snap: Snap, recorded: dict[str, bytes], tmp_path: Path
) -> None:
    """The manifest says how it was placed, and nothing is left of what was put on disk."""
    goldens = tmp_path / "goldens"
    # In float64 nothing of it would fit.
    spread = ("--no-oracle", "--device-map", "auto", "--max-memory", "cpu=400KB")
    assert snap(*OPTIONS, "--goldens", goldens, *spread).code == 0
    own = files(goldens)
    (manifest,) = [name for name in own if name.endswith("manifest.json")]
    placed = json.loads(own.pop(manifest))["environment"]
    assert (placed["device_map"], placed["max_memory"]) == ("auto", "cpu=400KB")
    # A module that lies on disk is not probed by itself.
    others = [
        manifest.replace("manifest.json", f"{name}.safetensors") for name in ("oracle", "probes")
    ]
    expected = {name: data for name, data in recorded.items() if name not in (manifest, *others)}
    assert own == expected
    assert not list(goldens.glob(".snap/**/*.offload"))


def test_too_little_memory_is_an_error_of_two_lines(snap: Snap, tmp_path: Path) -> None:
    """Release 4.51 of transformers loads no model of which everything is on disk."""
    spread = ("--device-map", "auto", "--max-memory", "cpu=1KB")
    run = snap(*OPTIONS, "--goldens", tmp_path / "goldens", *spread)
    assert run.code == 3
    assert error_lines(run)[1].strip() == "allow more with --max-memory"


@pytest.mark.parametrize(
    ("device_map", "memory"), [(None, "cpu=1GiB"), ("auto", "much"), ("auto", "cpu=1")]
)
def test_a_wrong_placement_is_refused(device_map: str | None, memory: str) -> None:
    """Before anything is loaded."""
    with pytest.raises(UsageError, match="--max-memory"):
        RecordRequest(str(CHECKPOINT), device_map=device_map, max_memory=[memory])
