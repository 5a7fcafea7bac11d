"""Checkpoints: a folder or a hub id, pinned by revision, with the digest of every file."""

from __future__ import annotations

import errno
import fnmatch
import glob
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from snapshot_tool.base.errors import CheckpointUnavailable, RevisionMismatch
from snapshot_tool.base.files import file_sha256

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CODE = "*.py"
_POINTER = b"version https://git-lfs"
# Configurations that may name code of the checkpoint ("auto_map").
_CONFIGURATIONS = (
    CONFIG,
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
)
# The `vocab_files_names` of all tokenizers of transformers, pickled ones left out.
_VOCABULARIES = (
    "artists.json", "bpe.codes", "byte_maps.json", "dict.txt", "emoji.json", "entity_vocab.json",
    "genres.json", "lyrics.json", "merges.txt", "normalizer.json", "prophetnet.tokenizer",
    "sentencepiece.bpe.model", "sentencepiece.model", "source.spm", "spiece.model", "spm.model",
    "spm_char.model", "target.spm", "target_vocab.json", "tekken.json", "tokenizer.model",
    "vocab-src.json", "vocab-tgt.json", "vocab.json", "vocab.txt", "word_pronunciation.json",
    "word_shape.json",
)  # fmt: skip
# Of the top folder, as patterns: a tokenizer may have files for several releases.
SMALL_FILES = (
    *_CONFIGURATIONS,
    *_VOCABULARIES,
    "generation_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.*.json",
    "*.tiktoken",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)


def loaded_files(folder: Path) -> list[str]:
    """Return the names of the files in a folder that are loaded, sorted.

    Files that the index of the weights names are returned even if they are missing, and so is a
    link to a missing file. Raises CheckpointUnavailable for an index that cannot be read.
    """
    here = [path for path in folder.iterdir() if path.is_file() or path.is_symlink()]
    here += (folder / "additional_chat_templates").glob("*.jinja")
    names = {path.relative_to(folder).as_posix() for path in here}
    # All Python files, since one may import another.
    code = {path.name for path in folder.glob(CODE)} if _names_code(folder) else set()
    return sorted({*filter(is_small_file, names), *weight_files(folder), *code})


def is_small_file(name: str) -> bool:
    """Return whether a file, by its name in the checkpoint, is loaded and not weights or code."""
    # fnmatch's * matches a slash, too.
    return any(
        fnmatch.fnmatchcase(name, pattern) and name.count("/") == pattern.count("/")
        for pattern in SMALL_FILES
    )


def weight_files(folder: Path) -> list[str]:
    """Return the names of the files with the weights, even if they are missing.

    As transformers does: one file, or else those that the index names. Raises CheckpointUnavailable
    for an index that is not valid.
    """
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    index = folder / INDEX
    if not index.is_file():
        return []
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _damaged(index, "names no files: it has no weight_map")
    for name in weight_map.values():
        path = PurePosixPath(name if isinstance(name, str) else "")
        if not path.parts or path.is_absolute() or ".." in path.parts:
            raise _damaged(index, f"names {name!r}, which is not a file of the checkpoint")
    return [INDEX, *sorted(set(weight_map.values()))]


def _names_code(folder: Path) -> bool:
    for path in (folder / name for name in _CONFIGURATIONS):
        try:
            if path.is_file() and "auto_map" in read_json(path):
                return True
        except CheckpointUnavailable:
            continue  # recording reports what is wrong with it
    return False


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a checkpoint; raise CheckpointUnavailable without one."""
    found = _parse(path)
    if not isinstance(found, dict):
        raise _damaged(path, "is not a JSON object")
    return found


def _parse(path: Path) -> Any:
    try:
        return json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"is not valid JSON: {error}") from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointUnavailable(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise _damaged(path, f"is not UTF-8: {error}") from error


def require_whole(folder: Path, names: Iterable[str]) -> None:
    """Raise CheckpointUnavailable, naming a file, if one is missing, cut short or damaged."""
    from safetensors import SafetensorError, safe_open  # torch comes with it

    for name in names:
        path = folder / name
        _require_file(path)
        if name.endswith(".safetensors"):
            try:
                with safe_open(path, framework="pt"):
                    pass
            except (SafetensorError, OSError) as error:
                raise _damaged(path, f"is cut short or damaged: {error}") from error
        elif name in _VOCABULARIES and name.endswith(".json"):
            _parse(path)
        elif name.endswith(".json"):
            read_json(path)
        elif name.endswith(".jinja"):
            _read_text(path)


def _require_file(path: Path) -> None:
    """Raise CheckpointUnavailable for an unreadable or empty file, or a Git LFS pointer."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_POINTER))
    except OSError as error:
        raise CheckpointUnavailable(f"{path} cannot be read: {error.strerror}") from error
    if start == _POINTER:
        raise CheckpointUnavailable(
            f"{path} is a Git LFS pointer, not the file itself", "fetch it with: git lfs pull"
        )
    if not start and not path.name.endswith((".txt", ".py")):
        raise _damaged(path, "is empty")


def _damaged(path: Path, problem: str) -> CheckpointUnavailable:
    return CheckpointUnavailable(f"{path} {problem}", "download the file again, or restore it")


DEFAULT_CHECKPOINT = "HuggingFaceTB/SmolVLM-256M-Instruct"
FOLDER_OWNER = "local"
_MIN_SHORT_REVISION = 7
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# Errors of the operating system for a cache that cannot be written.
_CACHE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG)
_HUB_ID = re.compile(rf"{_NAME.pattern}/{_NAME.pattern}")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint on this machine.

    Args:
        name: "owner/name"; a folder's owner is "local".
        revision: commit SHA on the hub, SHA-256 over the loaded files of a folder.
        folder: the folder of its files.
        files: SHA-256 of each file that is loaded, by relative path.
        resolved_from: the branch or tag that was given for the revision, or "".
    """

    name: str
    revision: str
    folder: Path
    files: Mapping[str, str]
    resolved_from: str = ""


def is_folder(spec: str) -> bool:
    """Return whether this is a folder, not a hub id: it exists, or is written like a path."""
    return Path(spec).is_dir() or spec.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(spec)


def checkpoint_name(spec: str) -> str:
    """Return the name under which goldens of a checkpoint are kept."""
    if not is_folder(spec):
        return spec
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", _expand(spec).resolve().name).lstrip(".-_")
    return f"{FOLDER_OWNER}/{name or 'checkpoint'}"


def _expand(spec: str) -> Path:
    try:
        return Path(spec).expanduser()
    except RuntimeError:  # no such user: then the folder is not found
        return Path(spec)


def is_folder_name(name: str) -> bool:
    """Return whether the goldens of this name are of a folder, not of a hub id."""
    return name.startswith(f"{FOLDER_OWNER}/")


def open_checkpoint(spec: str, *, revision: str | None, weights: bool = True) -> Checkpoint:
    """Find a checkpoint, downloading it if needed, and compute its digests.

    revision: by default the commit of a hub checkpoint's branch main. weights: whether weights and
    code are needed; a folder's revision is that of all its files.

    Raises CheckpointUnavailable if it is not available, RevisionMismatch if a folder's files do not
    have the given revision.
    """
    if is_folder(spec):
        return _open_folder(_expand(spec), revision=revision, weights=weights)
    return _open_hub(spec, revision=revision or "main", weights=weights)


def _hash_files(folder: Path, *, incomplete: str, weights: bool) -> dict[str, str]:
    """Return the SHA-256 of every file that is loaded, by relative path.

    incomplete: what to do if one of them is missing.
    """
    names = [name for name in loaded_files(folder) if weights or is_small_file(name)]
    for path in (folder / name for name in names):
        if not path.is_file():
            why = "a link to a missing file" if path.is_symlink() else f"named by {INDEX}"
            raise CheckpointUnavailable(f"{path} is missing: it is {why}", incomplete)
    return {name: file_sha256(folder / name) for name in names}


def folder_revision(files: Mapping[str, str]) -> str:
    """Return a folder's revision: the SHA-256 of what `sha256sum` prints for its sorted files."""
    listing = "".join(f"{digest}  {name}\n" for name, digest in sorted(files.items()))
    return hashlib.sha256(listing.encode()).hexdigest()


def require_same_files(checkpoint: Checkpoint, recorded: Mapping[str, str]) -> None:
    """Raise RevisionMismatch, naming a file, unless the checkpoint is the recorded one.

    Only files that are loaded count, though older golden sets list all files of a folder. Further
    small files are not a difference; further weights are.
    """
    added = sorted(n for n in checkpoint.files if n not in recorded and not is_small_file(n))
    if added:
        raise RevisionMismatch(
            f"{checkpoint.folder / added[0]} was not there when {checkpoint.name} was recorded",
            "remove it, or record the checkpoint as it is now",
        )
    for name, digest in sorted(recorded.items()):
        if name not in checkpoint.files:
            # Other weights that are missing are named by the index, which is compared itself.
            if not (is_small_file(name) or name in (WEIGHTS, INDEX)):
                continue
            problem = f"{checkpoint.folder / name} is missing"
        elif checkpoint.files[name] != digest:
            problem = f"{checkpoint.folder / name} has changed"
        else:
            continue
        raise RevisionMismatch(
            f"{problem} since {checkpoint.name} was recorded",
            "use the recorded revision, or record the new one: snap record --checkpoint "
            f"{checkpoint.folder}",
        )


def _open_folder(folder: Path, *, revision: str | None, weights: bool) -> Checkpoint:
    if not folder.is_dir():
        raise CheckpointUnavailable(
            f"checkpoint {folder} is neither a folder here nor a hub id (owner/name)",
            "pass a folder with config.json, or a hub id",
        )
    if not (folder / CONFIG).is_file():
        raise CheckpointUnavailable(
            f"checkpoint {folder} has no config.json",
            "pass the folder that holds the model's files",
        )
    try:
        files = _hash_files(
            folder, incomplete="download the rest of the checkpoint", weights=weights
        )
    except OSError as error:
        raise CheckpointUnavailable(f"checkpoint {folder} cannot be read: {error}") from error
    found = folder_revision(files)
    if revision and not (len(revision) >= _MIN_SHORT_REVISION and found.startswith(revision)):
        raise RevisionMismatch(
            f"the files of {folder} have revision {found}, not {revision}",
            "leave --revision out to record the folder as it is",
        )
    return Checkpoint(checkpoint_name(str(folder)), found, folder, files)


def _open_hub(name: str, *, revision: str, weights: bool) -> Checkpoint:
    """Download (or find in the cache) a hub checkpoint at a commit."""
    commit = revision if _COMMIT.fullmatch(revision) else _resolve(name, revision)
    folder = _download(name, commit, [*SMALL_FILES, *([WEIGHTS, INDEX] if weights else [])])
    if not (folder / CONFIG).is_file():
        raise CheckpointUnavailable(f"{name} at {commit} has no config.json")
    if weights:
        shards = [glob.escape(f) for f in weight_files(folder) if f not in (WEIGHTS, INDEX)]
        further = [*shards, *([CODE] if _names_code(folder) else [])]
        if further:
            _download(name, commit, further)
    files = _hash_files(
        folder, incomplete="connect to the network to download the rest", weights=weights
    )
    return Checkpoint(name, commit, folder, files, "" if commit == revision else revision)


def _download(name: str, commit: str, patterns: list[str]) -> Path:
    """Download the files of a hub checkpoint's top folder that match; return the folder."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    below = [f"*/{pattern}" for pattern in patterns]
    try:
        folder = snapshot_download(
            name, revision=commit, allow_patterns=patterns, ignore_patterns=below
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise _hub_problem(name, commit, error) from error
    return Path(folder)


def _resolve(name: str, revision: str) -> str:
    """Return the commit that a branch, a tag or a shortened SHA stands for now."""
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import HfHubHTTPError

    try:
        commit = HfApi().model_info(name, revision=revision).sha
    except (HfHubHTTPError, OSError, ValueError) as error:
        problem = _hub_problem(name, revision, error)
        if not problem.problem.startswith(f"{name} at "):
            raise problem from error
        # The hub is out of reach. Commits in the local cache can be named instead.
        snapshots = Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "snapshots"
        here = sorted(path.name for path in snapshots.glob("*") if _COMMIT.fullmatch(path.name))
        raise CheckpointUnavailable(
            f"{revision!r} of {name} cannot be resolved to a commit: "
            f"{problem.problem.rpartition('and ')[2]}",
            f"in the local cache is: --revision {', '.join(here[:3])}" if here else problem.remedy,
        ) from error
    if not commit or not _COMMIT.fullmatch(commit):
        raise CheckpointUnavailable(f"the hub names no commit for {name} at {revision!r}")
    return commit


def _hub_problem(name: str, revision: str, error: Exception) -> CheckpointUnavailable:
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # The hub's client wraps other problems in "not in the cache".
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    match error:
        case GatedRepoError():
            return CheckpointUnavailable(
                f"{name} is gated: the hub needs a token",
                "set HF_TOKEN, or log in with: huggingface-cli login",
            )
        case RepositoryNotFoundError():
            return CheckpointUnavailable(
                f"the hub has no checkpoint {name} (or it is private)",
                "check the name, set HF_TOKEN, or log in with: huggingface-cli login",
            )
        case RevisionNotFoundError():
            return CheckpointUnavailable(
                f"{name} has no revision {revision!r}", "pass a commit SHA, branch or tag of it"
            )
        case OSError(errno=number) if number in _CACHE_ERRORS:
            return CheckpointUnavailable(
                f"{name} cannot be written to the hub's cache: {error}",
                "free disk space, or name another folder with HF_HOME",
            )
        case OfflineModeIsEnabled():
            why = "offline mode is on (HF_HUB_OFFLINE)"
        case _:
            why = "the hub cannot be reached"
    return CheckpointUnavailable(
        f"{name} at {revision} is not in the local cache, and {why}",
        "connect to the network once, restore the cache (HF_HOME), or pass a folder: "
        "--checkpoint DIR",
    )
