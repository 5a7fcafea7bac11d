"""Checkpoints: folders by digest, hub ids through the real client and a server on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from snapshot_tool.base.checkpoint import checkpoint_name, open_checkpoint, require_same_files
from snapshot_tool.base.errors import CheckpointUnavailable, RevisionMismatch
from tests.unit.hub import COMMIT, FILES, REPOSITORY, serve_hub

PROGRAM = """
import json, sys
from snapshot_tool.base.checkpoint import open_checkpoint
from snapshot_tool.base.errors import SnapError
try:
    found = open_checkpoint(sys.argv[1], revision=sys.argv[2])
except SnapError as error:
    kind = type(error).__name__
    print(json.dumps({"kind": kind, "problem": error.problem, "remedy": error.remedy}))
else:
    print(json.dumps({"name": found.name, "revision": found.revision, "files": found.files,
                      "resolved_from": found.resolved_from, "folder": str(found.folder)}))
"""


def open_on_hub(home: Path, endpoint: str, name: str, revision: str, **environment: str) -> Any:
    """Open a hub checkpoint in a process of its own, with a cache of its own."""
    answer = subprocess.run(
        [sys.executable, "-c", PROGRAM, name, revision],
        env={
            **os.environ,
            "HF_HOME": str(home),
            "HF_ENDPOINT": endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a small checkpoint folder."""
    folder = tmp_path / "My model"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    (folder / "vocab.txt").write_text("b", encoding="utf-8")
    (folder / "README.md").write_text("x", encoding="utf-8")
    (folder / "sub" / "model.safetensors").write_text("x", encoding="utf-8")
    return folder


def test_a_folders_revision_is_the_digest_of_what_sha256sum_prints(folder: Path) -> None:
    """Anyone can compute it with coreutils; files that nothing loads do not count."""
    listing = subprocess.run(
        ["sha256sum", "config.json", "vocab.txt"], cwd=folder, capture_output=True, check=True
    ).stdout
    total = subprocess.run(["sha256sum"], input=listing, capture_output=True, check=True).stdout
    found = open_checkpoint(str(folder), revision=None)
    assert found.revision == total.decode().split()[0]
    assert sorted(found.files) == ["config.json", "vocab.txt"]
    assert found.name == checkpoint_name(str(folder)) == "local/My-model"


def test_a_folders_revision_must_match_the_one_given(folder: Path) -> None:
    """Shortened or whole; too short a prefix proves nothing."""
    revision = open_checkpoint(str(folder), revision=None).revision
    assert open_checkpoint(str(folder), revision=revision[:12]).revision == revision
    for wrong in ("f" * 40, revision[:3]):
        with pytest.raises(RevisionMismatch, match="have revision"):
            open_checkpoint(str(folder), revision=wrong)


def test_changed_missing_and_added_files_are_named(folder: Path) -> None:
    """Weights that were not there are a change; a file that nothing loads is none."""
    recorded = open_checkpoint(str(folder), revision=None).files
    (folder / "README.md").write_text("new", encoding="utf-8")
    (folder / "sub" / "more.safetensors").write_text("new", encoding="utf-8")
    require_same_files(open_checkpoint(str(folder), revision=None), recorded)
    (folder / "model.safetensors").write_text("new", encoding="utf-8")
    with pytest.raises(RevisionMismatch, match=r"model\.safetensors was not there"):
        require_same_files(open_checkpoint(str(folder), revision=None), recorded)
    (folder / "model.safetensors").unlink()
    (folder / "vocab.txt").write_text("c", encoding="utf-8")
    with pytest.raises(RevisionMismatch, match=r"vocab\.txt has changed"):
        require_same_files(open_checkpoint(str(folder), revision=None), recorded)
    (folder / "vocab.txt").unlink()
    with pytest.raises(RevisionMismatch, match=r"vocab\.txt is missing"):
        require_same_files(open_checkpoint(str(folder), revision=None), recorded)


def test_what_is_no_checkpoint_says_so(tmp_path: Path) -> None:
    """No such folder; a folder without config.json."""
    with pytest.raises(CheckpointUnavailable, match="is no folder here"):
        open_checkpoint(str(tmp_path / "nowhere"), revision=None)
    with pytest.raises(CheckpointUnavailable, match=r"has no config\.json"):
        open_checkpoint(str(tmp_path), revision=None)


def test_a_branch_is_resolved_and_downloaded_and_then_found_without_the_hub(
    tmp_path: Path,
) -> None:
    """The commit is what is kept; with it the cache answers when the hub is gone."""
    with serve_hub() as endpoint:
        found = open_on_hub(tmp_path, endpoint, REPOSITORY, "main")
    assert (found["name"], found["revision"]) == (REPOSITORY, COMMIT)
    assert found["resolved_from"] == "main"
    # Other formats of the weights stay on the hub.
    assert set(found["files"]) == {"config.json", "model.safetensors"}
    assert (Path(found["folder"]) / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    again = open_on_hub(tmp_path, endpoint, REPOSITORY, COMMIT)
    assert (again["revision"], again["resolved_from"]) == (COMMIT, "")
    assert again["files"] == found["files"]


@pytest.mark.parametrize(
    ("name", "revision", "problem"),
    [
        ("owner/nothing", "main", "the hub has no checkpoint owner/nothing"),
        ("owner/nothing", "6" * 40, "the hub has no checkpoint owner/nothing"),
        (REPOSITORY, "no-such-branch", "owner/model has no revision 'no-such-branch'"),
        (REPOSITORY, "6" * 40, f"owner/model has no revision '{'6' * 40}'"),
        ("owner/gated", "main", "owner/gated is gated"),
    ],
)
def test_what_the_hub_does_not_have_is_said_clearly(
    tmp_path: Path, name: str, revision: str, problem: str
) -> None:
    """Unknown, private, gated: what is wrong, and what to do."""
    with serve_hub() as endpoint:
        found = open_on_hub(tmp_path, endpoint, name, revision)
    assert found["kind"] == "CheckpointUnavailable"
    assert found["problem"].startswith(problem)
    assert found["remedy"]


def test_without_a_network_the_message_says_so(tmp_path: Path) -> None:
    """The hub out of reach, or offline mode on."""
    with serve_hub() as endpoint:
        pass  # its port is closed again
    gone = open_on_hub(tmp_path, endpoint, REPOSITORY, COMMIT)
    assert gone["kind"] == "CheckpointUnavailable"
    assert gone["problem"].endswith("is not in the local cache, and the hub cannot be reached")
    offline = open_on_hub(tmp_path, endpoint, REPOSITORY, "main", HF_HUB_OFFLINE="1")
    assert offline["problem"].endswith(": offline mode is on (HF_HUB_OFFLINE)")
    assert "--checkpoint DIR" in offline["remedy"]
