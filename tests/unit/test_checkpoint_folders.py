"""Checkpoint folders: their revision, their files, and how a folder is told from a hub id."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from snapshot_tool.checkpoint import (
    checkpoint_name,
    is_folder,
    open_checkpoint,
    require_same_files,
)
from snapshot_tool.core.errors import CheckpointUnavailable, RevisionMismatch, UsageError

PIPELINE = (
    "find . -type f -not -path '*/.*' -printf '%P\\0' | LC_ALL=C sort -z "
    "| xargs -0 sha256sum | sha256sum"
)
FILES = {
    "config.json": "{}",
    "B.txt": "upper case sorts first",
    "a b.txt": "a space",
    "größe.txt": "no ASCII",
    "sub/a.txt": "below",
    "sub-a.txt": "sorts before the slash",
    "model.safetensors": "weights",
    ".hidden": "not counted",
    ".git/config": "not counted",
    "sub/.cache/x.bin": "not counted",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a checkpoint folder with names that sort in surprising ways."""
    folder = tmp_path / "model"
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_the_revision_is_what_a_pipeline_of_coreutils_prints(folder: Path) -> None:
    """Find, sort and sha256sum give the same revision, for any names and without hidden files."""
    answer = subprocess.run(
        ["bash", "-c", PIPELINE], cwd=folder, capture_output=True, text=True, check=True
    )
    found = open_checkpoint(str(folder), revision=None)
    assert found.revision == answer.stdout.split()[0]
    visible = {name for name in FILES if not name.startswith(".") and "/." not in name}
    assert found.files.keys() == visible


def test_hidden_files_do_not_change_the_revision(folder: Path) -> None:
    """What tools leave beside the weights is not the checkpoint."""
    before = open_checkpoint(str(folder), revision=None).revision
    (folder / ".DS_Store").write_text("x", encoding="utf-8")
    (folder / ".git" / "config").write_text("y", encoding="utf-8")
    assert open_checkpoint(str(folder), revision=None).revision == before


@pytest.mark.parametrize("change", ["content", "name", "added"])
def test_any_other_change_changes_the_revision(folder: Path, change: str) -> None:
    """Content, names and the set of files all count."""
    before = open_checkpoint(str(folder), revision=None).revision
    if change == "content":
        (folder / "sub" / "a.txt").write_text("belov", encoding="utf-8")
    elif change == "name":
        (folder / "sub" / "a.txt").rename(folder / "sub" / "b.txt")
    else:
        (folder / "new.txt").write_text("", encoding="utf-8")
    assert open_checkpoint(str(folder), revision=None).revision != before


def test_a_revision_of_seven_digits_is_enough_and_one_of_six_is_not(folder: Path) -> None:
    """A revision may be shortened as far as git would print it."""
    revision = open_checkpoint(str(folder), revision=None).revision
    for accepted in (revision[:7], revision[:40], revision):
        assert open_checkpoint(str(folder), revision=accepted).revision == revision
    for refused in (revision[:6], revision[:7].upper() + "x", revision + "0", revision[1:20]):
        with pytest.raises(RevisionMismatch) as caught:
            open_checkpoint(str(folder), revision=refused)
        assert caught.value.problem == (
            f"the files of {folder} have revision {revision}, not {refused}"
        )
        assert caught.value.remedy == "leave --revision out to record the folder as it is"


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin", "x.pt", "x.pth", "sub/x.bin"])
def test_added_weights_of_any_format_are_refused(folder: Path, name: str) -> None:
    """A model may load them, so they are named before anything runs."""
    recorded = open_checkpoint(str(folder), revision=None).files
    (folder / name).write_text("more", encoding="utf-8")
    with pytest.raises(RevisionMismatch) as caught:
        require_same_files(open_checkpoint(str(folder), revision=None), recorded)
    assert caught.value.problem == (f"{folder / name} was not there when local/model was recorded")


def test_the_first_differing_file_is_named_with_what_to_do(folder: Path) -> None:
    """Of several differences the first by name is told."""
    checkpoint = open_checkpoint(str(folder), revision=None)
    files = {**checkpoint.files, "config.json": "0" * 64}
    del files["sub/a.txt"]
    with pytest.raises(RevisionMismatch) as caught:
        require_same_files(replace(checkpoint, files=files), checkpoint.files)
    assert caught.value.problem == (
        f"{folder / 'config.json'} has changed since local/model was recorded"
    )
    assert caught.value.remedy == (
        f"use the recorded revision, or record the new one: snap record --checkpoint {folder}"
    )
    require_same_files(checkpoint, checkpoint.files)


@pytest.mark.parametrize(
    ("spec", "folder"),
    [
        ("HuggingFaceTB/SmolVLM-256M-Instruct", False),
        ("owner/name", False),
        ("./owner/name", True),
        ("/owner/name", True),
        ("~/name", True),
        ("name", True),
        ("a/b/c", True),
        ("../name", True),
        ("owner/", True),
    ],
)
def test_a_folder_is_told_from_a_hub_id(spec: str, *, folder: bool) -> None:
    """One slash between two names is the hub's; all else is written like a path."""
    assert is_folder(spec) is folder


def test_a_folder_that_exists_wins_over_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies here under that name is what is meant."""
    monkeypatch.chdir(tmp_path)
    assert not is_folder("owner/name")
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert is_folder("owner/name")
    assert checkpoint_name("owner/name") == "local/name"


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("tiny", "local/tiny"),
        ("My model (v2)", "local/My-model-v2-"),
        ("..hidden", "local/hidden"),
        ("größe", "local/gr-e"),
        ("日本", "local/checkpoint"),
    ],
)
def test_a_folders_name_becomes_one_that_a_manifest_takes(
    tmp_path: Path, folder: str, name: str
) -> None:
    """Anything but letters, digits, dots, hyphens and underscores becomes a hyphen."""
    (tmp_path / folder).mkdir()
    assert checkpoint_name(str(tmp_path / folder)) == name


def test_a_hub_id_without_a_revision_is_a_usage_error() -> None:
    """A golden is pinned to one commit: the user is asked for it, and the hub is not."""
    with pytest.raises(UsageError) as caught:
        open_checkpoint("owner/name", revision=None)
    assert str(caught.value) == (
        "--revision is needed for owner/name: a golden is pinned to one commit\n"
        "pass a commit SHA, or a branch or tag to be resolved to one"
    )


@pytest.mark.parametrize("spec", ["/no/such/folder", "no-such-folder", "a/b/c", "~no-such-user/x"])
def test_a_folder_that_is_not_there_is_said_in_two_lines(spec: str) -> None:
    """Whatever the path looks like, it is named as the user wrote it."""
    with pytest.raises(CheckpointUnavailable) as caught:
        open_checkpoint(spec, revision=None)
    assert str(caught.value) == (
        f"checkpoint {spec} is no folder here and no hub id (owner/name)\n"
        "pass a folder with config.json, or a hub id"
    )
