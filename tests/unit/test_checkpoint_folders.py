"""Checkpoint folders: their revision, their files, and how a folder is told from a hub id."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from snapshot_tool.base.checkpoint import (
    checkpoint_name,
    is_folder,
    open_checkpoint,
    require_same_files,
)
from snapshot_tool.base.errors import CheckpointUnavailable, RevisionMismatch, UsageError

INDEX = {"metadata": {}, "weight_map": {"a": "one.safetensors", "b": "parts/two.safetensors"}}
LOADED = {
    "config.json": "{}",
    "tokenizer.json": "{}",
    "tokenizer.4.0.0.json": "{}",
    "additional_chat_templates/tools.jinja": "{{ messages }}",
    "model.safetensors.index.json": json.dumps(INDEX),
    "one.safetensors": "weights",
    "parts/two.safetensors": "weights",
}
NOT_LOADED = {
    "README.md": "text",
    "notes.txt": "text",
    "eval.json": "{}",
    "helper.py": "no configuration names code",
    "pytorch_model.bin": "the same weights",
    "consolidated.safetensors": "the same weights",
    "model-00001-of-00003.safetensors": "of an earlier save",
    "original/config.json": "{}",
    "original/model.safetensors": "the same weights",
    "onnx/model.onnx": "the same weights",
    ".hidden": "",
    ".git/config": "",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a checkpoint folder with more in it than is loaded."""
    folder = tmp_path / "model"
    for name, text in (LOADED | NOT_LOADED).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_only_what_is_loaded_counts(folder: Path) -> None:
    """The weights that the index names, and the files with the names that transformers reads."""
    found = open_checkpoint(str(folder), revision=None)
    assert found.files.keys() == LOADED.keys()
    for name in NOT_LOADED:
        (folder / name).write_text("edited", encoding="utf-8")
    assert open_checkpoint(str(folder), revision=None) == found


def test_the_revision_is_what_sha256sum_prints_for_these_files(folder: Path) -> None:
    """Anyone can compute it with coreutils, from the manifest's list of files."""
    command = ["bash", "-c", 'sha256sum "$@" | sha256sum', "", *sorted(LOADED)]
    answer = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    assert open_checkpoint(str(folder), revision=None).revision == answer.stdout.split()[0]


def test_one_file_of_weights_is_taken_before_an_index(folder: Path) -> None:
    """As transformers does it."""
    (folder / "model.safetensors").write_text("all weights", encoding="utf-8")
    files = open_checkpoint(str(folder), revision=None).files
    assert {name for name in files if name.endswith(".safetensors")} == {"model.safetensors"}


def test_python_files_count_if_a_configuration_names_code(folder: Path) -> None:
    """They are what --trust-remote-code runs."""
    config = {"auto_map": {"AutoProcessor": "own.OwnProcessor"}}
    (folder / "processor_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "own.py").write_text("", encoding="utf-8")
    files = open_checkpoint(str(folder), revision=None).files
    assert files.keys() - LOADED.keys() == {"processor_config.json", "own.py", "helper.py"}


@pytest.mark.parametrize("change", ["content", "name", "added"])
def test_any_change_of_a_loaded_file_changes_the_revision(folder: Path, change: str) -> None:
    """Content, names and the set of files all count."""
    before = open_checkpoint(str(folder), revision=None).revision
    if change == "content":
        (folder / "parts" / "two.safetensors").write_text("other", encoding="utf-8")
    elif change == "name":
        (folder / "tokenizer.json").rename(folder / "vocab.json")
    else:
        (folder / "vocab.txt").write_text("", encoding="utf-8")
    assert open_checkpoint(str(folder), revision=None).revision != before


@pytest.mark.parametrize(
    ("index", "problem"),
    [
        (INDEX, "one.safetensors is missing"),
        (
            {"weight_map": {"a": "../elsewhere.safetensors"}},
            "which is not a file of the checkpoint",
        ),
        ({"weight_map": {"a": "/etc/passwd"}}, "which is not a file of the checkpoint"),
        ({"weight_map": {"a": ["one.safetensors"]}}, "which is not a file of the checkpoint"),
        ({"weight_map": {}}, "has no weight_map"),
        ([], "is not a JSON object"),
    ],
)
def test_an_index_and_files_that_do_not_fit_are_named(
    folder: Path, index: object, problem: str
) -> None:
    """A download that was cut short, or a damaged index: one line with the file."""
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "one.safetensors").unlink()
    with pytest.raises(CheckpointUnavailable) as caught:
        open_checkpoint(str(folder), revision=None)
    assert problem in caught.value.problem
    assert "model.safetensors.index.json" in caught.value.problem


def test_a_link_to_a_missing_file_is_named(folder: Path) -> None:
    """As in a cache whose blobs are gone: the file would be passed over in silence."""
    (folder / "generation_config.json").symlink_to(folder / "gone")
    with pytest.raises(CheckpointUnavailable, match=r"generation_config\.json is missing"):
        open_checkpoint(str(folder), revision=None)


def test_a_set_that_lists_all_files_of_a_folder_is_accepted(folder: Path) -> None:
    """As earlier versions recorded it: only what is loaded is compared."""
    checkpoint = open_checkpoint(str(folder), revision=None)
    recorded = {**checkpoint.files, **dict.fromkeys(NOT_LOADED, "0" * 64)}
    require_same_files(checkpoint, recorded)
    with pytest.raises(RevisionMismatch, match=r"config\.json has changed"):
        require_same_files(checkpoint, {**recorded, "config.json": "0" * 64})


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


def test_added_weights_that_would_be_loaded_are_refused(folder: Path) -> None:
    """They are named before anything runs."""
    recorded = open_checkpoint(str(folder), revision=None).files
    (folder / "model.safetensors").write_text("more", encoding="utf-8")
    with pytest.raises(RevisionMismatch) as caught:
        require_same_files(open_checkpoint(str(folder), revision=None), recorded)
    assert caught.value.problem == (
        f"{folder / 'model.safetensors'} was not there when local/model was recorded"
    )


def test_the_first_differing_file_is_named_with_what_to_do(folder: Path) -> None:
    """Of several differences the first by name is reported."""
    checkpoint = open_checkpoint(str(folder), revision=None)
    files = {**checkpoint.files, "config.json": "0" * 64}
    del files["tokenizer.json"]
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
