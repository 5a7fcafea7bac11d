"""Hub checkpoints, through the real client and a server on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.unit.hub import COMMIT, FILES, REPOSITORY, serve_hub

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
# The client reads the hub's address and its cache once, at import.
PROGRAM = """
import json, os, sys
from snapshot_tool.base.checkpoint import open_checkpoint
from snapshot_tool.base.errors import SnapError
try:
    weights = "SNAP_TEST_SMALL" not in os.environ
    found = open_checkpoint(sys.argv[1], revision=sys.argv[2] or None, weights=weights)
except SnapError as error:
    sys.exit(f"{type(error).__name__}\\n{error}")
print(json.dumps({"name": found.name, "revision": found.revision, "files": found.files,
                  "resolved_from": found.resolved_from, "folder": str(found.folder)}))
"""


def run(home: Path, name: str, revision: str, **environment: str) -> Any:
    """Open a hub checkpoint in a process of its own, with a cache of its own."""
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, name, revision],
        env={
            **os.environ,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def open_on_hub(home: Path, endpoint: str, revision: str = COMMIT) -> Any:
    """Return the checkpoint that was opened."""
    answer = run(home, REPOSITORY, revision, HF_ENDPOINT=endpoint)
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout)


@pytest.mark.parametrize("branch", ["main", ""])
def test_a_branch_is_resolved_and_downloaded_and_then_found_without_the_hub(
    tmp_path: Path, branch: str
) -> None:
    """The commit is kept; with it the cache answers when the hub is gone. main is the default."""
    with serve_hub() as endpoint:
        found = open_on_hub(tmp_path, endpoint, branch)
    assert (found["name"], found["revision"]) == (REPOSITORY, COMMIT)
    assert found["resolved_from"] == "main"
    # Other formats of the weights stay on the hub.
    assert set(found["files"]) == {"config.json", "model.safetensors"}
    assert (Path(found["folder"]) / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    again = open_on_hub(tmp_path, endpoint)
    assert (again["revision"], again["resolved_from"]) == (COMMIT, "")
    assert again["files"] == found["files"]


def test_loaded_files_are_downloaded_with_their_digests_and_no_others(tmp_path: Path) -> None:
    """Files in folders, of several blocks, code that a configuration names; no second weights."""
    with serve_hub(LOADED | NOT_LOADED) as endpoint:
        found = open_on_hub(tmp_path, endpoint)
    wanted = {name: hashlib.sha256(data).hexdigest() for name, data in LOADED.items()}
    assert found["files"] == wanted
    folder = Path(found["folder"])
    here = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert here == wanted.keys()
    # A download that was cut short: without the hub, what the cache lacks is named.
    (folder / "a.safetensors").unlink()
    again = run(tmp_path, REPOSITORY, COMMIT, HF_HUB_OFFLINE="1")
    assert "a.safetensors is missing" in again.stderr


def test_what_needs_no_weights_downloads_none(tmp_path: Path) -> None:
    """Preprocessing reads small files alone."""
    with serve_hub(LOADED | NOT_LOADED) as endpoint:
        answer = run(tmp_path, REPOSITORY, COMMIT, HF_ENDPOINT=endpoint, SNAP_TEST_SMALL="1")
    found = json.loads(answer.stdout)
    here = {path.name for path in Path(found["folder"]).rglob("*") if path.is_file()}
    assert found["files"].keys() == {"config.json", "additional_chat_templates/tools.jinja"}
    assert here == {"config.json", "tools.jinja"}


def test_a_checkpoint_without_config_is_refused(tmp_path: Path) -> None:
    """A repository of weights alone is no checkpoint."""
    with serve_hub({"model.safetensors": b"weights"}) as endpoint:
        answer = run(tmp_path, REPOSITORY, COMMIT, HF_ENDPOINT=endpoint)
    assert f"{REPOSITORY} at {COMMIT} has no config.json" in answer.stderr


@pytest.mark.parametrize(
    ("name", "revision", "environment", "problem"),
    [
        ("owner/nothing", "main", {}, "the hub has no checkpoint owner/nothing"),
        ("owner/nothing", "6" * 40, {}, "the hub has no checkpoint owner/nothing"),
        (REPOSITORY, "no-such-branch", {}, "owner/model has no revision 'no-such-branch'"),
        (REPOSITORY, "6" * 40, {}, f"owner/model has no revision '{'6' * 40}'"),
        ("owner/gated", "main", {}, "owner/gated is gated"),
        (REPOSITORY, COMMIT, {"HF_HUB_OFFLINE": "1"}, "offline mode is on (HF_HUB_OFFLINE)"),
        (REPOSITORY, "main", {"HF_HUB_OFFLINE": "1"}, "offline mode is on (HF_HUB_OFFLINE)"),
        (
            REPOSITORY,
            COMMIT,
            {"HF_ENDPOINT": "http://127.0.0.1:9"},
            "is not in the local cache, and the hub cannot be reached",
        ),
    ],
)
def test_what_the_hub_does_not_give_is_two_lines(
    tmp_path: Path, name: str, revision: str, environment: Mapping[str, str], problem: str
) -> None:
    """Neither a traceback nor the client's own messages reach the terminal."""
    with serve_hub() as endpoint:
        answer = run(tmp_path, name, revision, **{"HF_ENDPOINT": endpoint, **environment})
    assert answer.returncode == 1
    kind, found, remedy = answer.stderr.splitlines()
    assert kind == "CheckpointUnavailable"
    assert problem in found
    assert remedy


def test_a_branch_cannot_be_resolved_offline_and_the_cached_commit_is_named(
    tmp_path: Path,
) -> None:
    """The commit may be in the cache: then it can be passed."""
    folder = f"models--{REPOSITORY.replace('/', '--')}"
    (tmp_path / "hub" / folder / "snapshots" / COMMIT).mkdir(parents=True)
    lines = run(tmp_path, REPOSITORY, "main", HF_HUB_OFFLINE="1").stderr.splitlines()
    assert lines[2] == f"in the local cache is: --revision {COMMIT}"
