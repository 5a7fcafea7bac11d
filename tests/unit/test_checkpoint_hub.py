"""What comes from the hub is complete and known by its digests, and errors are two lines."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.unit.hub import COMMIT, REPOSITORY, serve_hub
from tests.unit.test_checkpoint import open_on_hub

WEIGHTS = bytes(range(256)) * 10_000
LOADED = {
    "config.json": b'{"auto_map": {"AutoTokenizer": "own.Own"}}',
    "own.py": b"class Own: ...",
    "additional_chat_templates/tools.jinja": b"{{ messages }}",
    "model.safetensors.index.json": b'{"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}',
    "a.safetensors": WEIGHTS,
    "b.safetensors": WEIGHTS[1:],
}
NOT_LOADED = {
    "README.md": b"",
    "consolidated.safetensors": WEIGHTS,
    "onnx/config.json": b"{}",
    "original/model.safetensors": WEIGHTS,
    "original/own.py": b"",
    "pytorch_model.bin": WEIGHTS,
}
PROGRAM = """
import sys
from snapshot_tool.base.checkpoint import open_checkpoint
from snapshot_tool.base.errors import SnapError
try:
    open_checkpoint(sys.argv[1], revision=sys.argv[2])
except SnapError as error:
    sys.exit(f"{type(error).__name__}\\n{error}")
"""


def fail_on_hub(home: Path, name: str, revision: str, **environment: str) -> list[str]:
    """Return all lines on stderr of a process that asks the hub in vain."""
    answer = subprocess.run(
        [sys.executable, "-c", PROGRAM, name, revision],
        env={**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert answer.returncode == 1
    return answer.stderr.splitlines()


def test_what_is_loaded_is_downloaded_with_its_digest_and_nothing_else(tmp_path: Path) -> None:
    """Files in folders, of several blocks, code that a configuration names; no second weights."""
    with serve_hub(LOADED | NOT_LOADED) as endpoint:
        found = open_on_hub(tmp_path, endpoint, REPOSITORY, COMMIT)
    wanted = {name: hashlib.sha256(data).hexdigest() for name, data in LOADED.items()}
    assert found["files"] == wanted
    assert (found["revision"], found["resolved_from"]) == (COMMIT, "")
    folder = Path(found["folder"])
    here = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert here == wanted.keys()


def test_a_download_that_was_cut_short_is_named(tmp_path: Path) -> None:
    """Without the hub, what the cache lacks of the weights is named."""
    with serve_hub(LOADED) as endpoint:
        found = open_on_hub(tmp_path, endpoint, REPOSITORY, COMMIT)
    (Path(found["folder"]) / "a.safetensors").unlink()
    again = open_on_hub(tmp_path, endpoint, REPOSITORY, COMMIT, HF_HUB_OFFLINE="1")
    assert again["kind"] == "CheckpointUnavailable"
    assert "a.safetensors is missing" in again["problem"]


def test_a_checkpoint_without_config_is_refused(tmp_path: Path) -> None:
    """A repository of weights alone is no checkpoint."""
    with serve_hub({"model.safetensors": b"weights"}) as endpoint:
        found = open_on_hub(tmp_path, endpoint, REPOSITORY, COMMIT)
    assert found["kind"] == "CheckpointUnavailable"
    assert found["problem"] == f"{REPOSITORY} at {COMMIT} has no config.json"


@pytest.mark.parametrize(
    ("name", "revision", "environment"),
    [
        ("owner/nothing", "main", {}),
        ("owner/gated", "main", {}),
        (REPOSITORY, "6" * 40, {}),
        (REPOSITORY, COMMIT, {"HF_HUB_OFFLINE": "1"}),
        (REPOSITORY, COMMIT, {"HF_ENDPOINT": "http://127.0.0.1:9"}),
    ],
    ids=["unknown", "gated", "revision", "offline", "unreachable"],
)
def test_an_error_is_two_lines_and_no_traceback(
    tmp_path: Path, name: str, revision: str, environment: Mapping[str, str]
) -> None:
    """Nothing else reaches the terminal: neither a traceback nor the client's own messages."""
    with serve_hub() as endpoint:
        lines = fail_on_hub(tmp_path, name, revision, **{"HF_ENDPOINT": endpoint, **environment})
    kind, problem, remedy = lines
    assert kind == "CheckpointUnavailable"
    assert name in problem
    assert remedy


def test_offline_mode_is_named_where_the_commit_is_not_in_the_cache(tmp_path: Path) -> None:
    """With a full SHA the cache is looked into, and named."""
    lines = fail_on_hub(tmp_path, REPOSITORY, COMMIT, HF_HUB_OFFLINE="1")
    assert lines[1] == (
        f"{REPOSITORY} at {COMMIT} is not in the local cache, "
        "and offline mode is on (HF_HUB_OFFLINE)"
    )
    assert lines[2] == "connect to the network, or pass a folder: --checkpoint DIR"


def test_a_branch_cannot_be_resolved_offline_and_the_cached_commit_is_named(
    tmp_path: Path,
) -> None:
    """The commit may be in the cache: then it is what to pass."""
    lines = fail_on_hub(tmp_path, REPOSITORY, "main", HF_HUB_OFFLINE="1")
    assert lines[1] == (
        f"'main' of {REPOSITORY} cannot be resolved to a commit: "
        "offline mode is on (HF_HUB_OFFLINE)"
    )
    folder = f"models--{REPOSITORY.replace('/', '--')}"
    (tmp_path / "hub" / folder / "snapshots" / COMMIT).mkdir(parents=True)
    lines = fail_on_hub(tmp_path, REPOSITORY, "main", HF_HUB_OFFLINE="1")
    assert lines[2] == f"in the local cache is: --revision {COMMIT}"
