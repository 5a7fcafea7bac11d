"""Checkpoint folders: their revision, their files, and how a folder is told from a hub id."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from snapshot_tool.base.checkpoint import (
    Checkpoint,
    checkpoint_name,
    is_folder,
    open_checkpoint,
    require_same_files,
)
from snapshot_tool.base.errors import CheckpointUnavailable, RevisionMismatch

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


def opened(folder: Path, revision: str | None = None) -> Checkpoint:
    """Open a folder."""
    return open_checkpoint(str(folder), revision=revision)


def test_only_loaded_files_count_and_the_revision_is_what_sha256sum_prints(folder: Path) -> None:
    """Anyone can compute it with coreutils, from the manifest's list of files."""
    found = opened(folder)
    assert found.files.keys() == LOADED.keys()
    for name in NOT_LOADED:
        (folder / name).write_text("edited", encoding="utf-8")
    assert opened(folder) == found
    command = ["bash", "-c", 'sha256sum "$@" | sha256sum', "", *sorted(LOADED)]
    answer = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    assert found.revision == answer.stdout.split()[0]


def test_one_file_of_weights_is_taken_before_an_index(folder: Path) -> None:
    """As transformers does it."""
    (folder / "model.safetensors").write_text("all weights", encoding="utf-8")
    files = opened(folder).files
    assert {name for name in files if name.endswith(".safetensors")} == {"model.safetensors"}


def test_python_files_count_if_a_configuration_names_code(folder: Path) -> None:
    """They are what --trust-remote-code runs."""
    config = {"auto_map": {"AutoProcessor": "own.OwnProcessor"}}
    (folder / "processor_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "own.py").write_text("", encoding="utf-8")
    added = opened(folder).files.keys() - LOADED.keys()
    assert added == {"processor_config.json", "own.py", "helper.py"}


@pytest.mark.parametrize("change", ["content", "name", "added"])
def test_any_change_of_a_loaded_file_changes_the_revision(folder: Path, change: str) -> None:
    """Content, names and the set of files all count."""
    before = opened(folder).revision
    if change == "content":
        (folder / "parts" / "two.safetensors").write_text("other", encoding="utf-8")
    elif change == "name":
        (folder / "tokenizer.json").rename(folder / "vocab.json")
    else:
        (folder / "vocab.txt").write_text("", encoding="utf-8")
    assert opened(folder).revision != before


@pytest.mark.parametrize(
    ("index", "problem"),
    [
        (INDEX, "one.safetensors is missing"),
        ({"weight_map": {"a": "../elsewhere.safetensors"}}, "which is not a file of"),
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
        opened(folder)
    assert problem in caught.value.problem
    assert "model.safetensors.index.json" in caught.value.problem


def test_a_link_to_a_missing_file_is_named(folder: Path) -> None:
    """As in a cache whose blobs are gone: the file would be passed over in silence."""
    (folder / "generation_config.json").symlink_to(folder / "gone")
    with pytest.raises(CheckpointUnavailable, match=r"generation_config\.json is missing"):
        opened(folder)


def test_a_revision_may_be_shortened_to_seven_digits(folder: Path) -> None:
    """A shorter prefix proves nothing."""
    revision = opened(folder).revision
    for accepted in (revision[:7], revision[:40], revision):
        assert opened(folder, accepted).revision == revision
    for refused in (revision[:6], revision[:7].upper() + "x", revision + "0", revision[1:20]):
        with pytest.raises(RevisionMismatch, match=f"have revision {revision}, not {refused}"):
            opened(folder, refused)


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("model.safetensors", "new", "was not there when local/model was recorded"),
        ("config.json", '{"new": 1}', "has changed since local/model was recorded"),
        ("tokenizer.json", None, "is missing since local/model was recorded"),
        ("vocab.txt", "a further small file", None),
        ("README.md", "not loaded", None),
    ],
)
def test_a_checkpoint_must_have_the_recorded_files(
    folder: Path, name: str, change: str | None, problem: str | None
) -> None:
    """Also if the set lists all files of the folder, as earlier versions recorded it."""
    recorded = opened(folder).files
    if change is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(change, encoding="utf-8")
    for files in (recorded, {**dict.fromkeys(NOT_LOADED, "0" * 64), **recorded}):
        if problem is None:
            require_same_files(opened(folder), files)
            continue
        with pytest.raises(RevisionMismatch) as caught:
            require_same_files(opened(folder), files)
        assert caught.value.problem == f"{folder / name} {problem}"
        assert caught.value.remedy


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
    """The local folder of that name is meant."""
    monkeypatch.chdir(tmp_path)
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


@pytest.mark.parametrize("spec", ["/no/such/folder", "no-such-folder", "a/b/c", "~no-such-user/x"])
def test_a_folder_that_is_not_there_is_named_as_the_user_wrote_it(spec: str) -> None:
    """And what would be a checkpoint."""
    with pytest.raises(CheckpointUnavailable, match=f"checkpoint {spec} is"):
        open_checkpoint(spec, revision=None)


def test_a_folder_without_a_configuration_is_no_checkpoint(tmp_path: Path) -> None:
    """Its files may be those of anything."""
    with pytest.raises(CheckpointUnavailable, match=r"has no config\.json"):
        opened(tmp_path)
