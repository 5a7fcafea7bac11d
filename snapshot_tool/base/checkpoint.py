"""Checkpoints: a folder or a hub id, pinned by revision, every file known by its digest."""

from __future__ import annotations

import errno
import glob
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from snapshot_tool.base.checkpoint_files import (
    CODE,
    CONFIG,
    INDEX,
    SMALL_FILES,
    WEIGHTS,
    is_small_file,
    loaded_files,
    names_code,
    weight_files,
)
from snapshot_tool.base.errors import CheckpointUnavailable, RevisionMismatch, UsageError
from snapshot_tool.base.files import file_sha256

DEFAULT_CHECKPOINT = "HuggingFaceTB/SmolVLM-256M-Instruct"
FOLDER_OWNER = "local"
_MIN_SHORT_REVISION = 7
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# What the system says if a folder takes no file.
_CACHE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG)
_HUB_ID = re.compile(rf"{_NAME.pattern}/{_NAME.pattern}")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that lies on this machine.

    Args:
        name: "owner/name"; a folder's owner is "local".
        revision: commit SHA on the hub, SHA-256 over the loaded files of a folder.
        folder: where its files lie.
        files: SHA-256 of each file that is loaded, by relative path.
        resolved_from: the branch or tag that was given for the revision, or "".
    """

    name: str
    revision: str
    folder: Path
    files: Mapping[str, str]
    resolved_from: str = ""


def is_folder(spec: str) -> bool:
    """Tell a folder from a hub id: it exists, or is written like a path."""
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
    except RuntimeError:  # no such user: left as it is written, and then not found
        return Path(spec)


def is_folder_name(name: str) -> bool:
    """Tell the name of a folder's goldens from a hub id's."""
    return name.startswith(f"{FOLDER_OWNER}/")


def open_checkpoint(spec: str, *, revision: str | None) -> Checkpoint:
    """Find a checkpoint and read its digests.

    Raises CheckpointUnavailable where it cannot be had, RevisionMismatch where a folder's files are
    not those of the revision given.
    """
    if is_folder(spec):
        return _open_folder(_expand(spec), revision=revision)
    if not revision:
        raise UsageError(
            f"--revision is needed for {spec}: a golden is pinned to one commit",
            "pass a commit SHA, or a branch or tag to be resolved to one",
        )
    return _open_hub(spec, revision=revision)


def _hash_files(folder: Path, *, incomplete: str) -> dict[str, str]:
    """Return the SHA-256 of every file that is loaded, by relative path.

    incomplete: what to do if one of them is missing.
    """
    names = loaded_files(folder)
    for name in names:
        if not (folder / name).is_file():
            why = (
                "a link to a missing file" if (folder / name).is_symlink() else f"named by {INDEX}"
            )
            raise CheckpointUnavailable(f"{folder / name} is missing: it is {why}", incomplete)
    return {name: file_sha256(folder / name) for name in names}


def folder_revision(files: Mapping[str, str]) -> str:
    """Return a folder's revision: the SHA-256 of what `sha256sum` prints for its sorted files."""
    listing = "".join(f"{digest}  {name}\n" for name, digest in sorted(files.items()))
    return hashlib.sha256(listing.encode()).hexdigest()


def require_same_files(checkpoint: Checkpoint, recorded: Mapping[str, str]) -> None:
    """Raise RevisionMismatch, naming a file, unless the checkpoint is the one recorded.

    Only files that are loaded count. Golden sets of earlier versions list all files of a folder.
    Further small files are no difference, further weights are.
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


def _open_folder(folder: Path, *, revision: str | None) -> Checkpoint:
    if not folder.is_dir():
        raise CheckpointUnavailable(
            f"checkpoint {folder} is no folder here and no hub id (owner/name)",
            "pass a folder with config.json, or a hub id",
        )
    if not (folder / CONFIG).is_file():
        raise CheckpointUnavailable(
            f"checkpoint {folder} has no config.json",
            "pass the folder that holds the model's files",
        )
    try:
        files = _hash_files(folder, incomplete="download the rest of the checkpoint")
    except OSError as error:
        raise CheckpointUnavailable(f"checkpoint {folder} cannot be read: {error}") from error
    found = folder_revision(files)
    if revision and not (len(revision) >= _MIN_SHORT_REVISION and found.startswith(revision)):
        raise RevisionMismatch(
            f"the files of {folder} have revision {found}, not {revision}",
            "leave --revision out to record the folder as it is",
        )
    return Checkpoint(checkpoint_name(str(folder)), found, folder, files)


def _open_hub(name: str, *, revision: str) -> Checkpoint:
    """Download (or find in the cache) a hub checkpoint at a commit."""
    commit = revision if _COMMIT.fullmatch(revision) else _resolve(name, revision)
    folder = _download(name, commit, [*SMALL_FILES, WEIGHTS, INDEX])
    if not (folder / CONFIG).is_file():
        raise CheckpointUnavailable(f"{name} at {commit} has no config.json")
    shards = [glob.escape(file) for file in weight_files(folder) if file not in (WEIGHTS, INDEX)]
    further = [*shards, *([CODE] if names_code(folder) else [])]
    if further:
        _download(name, commit, further)
    files = _hash_files(folder, incomplete="connect to the network to download the rest")
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
    from huggingface_hub.errors import HfHubHTTPError

    try:
        commit = HfApi().model_info(name, revision=revision).sha
    except (HfHubHTTPError, OSError, ValueError) as error:
        problem = _hub_problem(name, revision, error)
        if problem.problem.startswith(f"{name} at "):
            raise _unresolved(name, revision, problem) from error
        raise problem from error
    if not commit or not _COMMIT.fullmatch(commit):
        raise CheckpointUnavailable(f"the hub names no commit for {name} at {revision!r}")
    return commit


def _unresolved(name: str, revision: str, why: CheckpointUnavailable) -> CheckpointUnavailable:
    """Say that a branch or tag cannot be resolved, and which commits are here all the same."""
    from huggingface_hub.constants import HF_HUB_CACHE

    snapshots = Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "snapshots"
    here = sorted(path.name for path in snapshots.glob("*") if _COMMIT.fullmatch(path.name))
    reason = why.problem.rpartition("and ")[2]
    return CheckpointUnavailable(
        f"{revision!r} of {name} cannot be resolved to a commit: {reason}",
        f"in the local cache is: --revision {', '.join(here[:3])}" if here else why.remedy,
    )


def _hub_problem(name: str, revision: str, error: Exception) -> CheckpointUnavailable:
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # The hub's client wraps other problems in "not in the cache": what it wraps says more.
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    match error:
        case GatedRepoError():
            return CheckpointUnavailable(
                f"{name} is gated: the hub wants a token", "log in with: huggingface-cli login"
            )
        case RepositoryNotFoundError():
            return CheckpointUnavailable(
                f"the hub has no checkpoint {name} (or it is private)",
                "check the name, or log in with: huggingface-cli login",
            )
        case RevisionNotFoundError():
            return CheckpointUnavailable(
                f"{name} has no revision {revision!r}", "pass a commit SHA, branch or tag of it"
            )
        case OSError(errno=number) if number in _CACHE_ERRORS:
            return CheckpointUnavailable(
                f"{name} cannot be written to the hub's cache: {error}",
                "make room, or name another folder with HF_HOME",
            )
        case OfflineModeIsEnabled():
            why = "offline mode is on (HF_HUB_OFFLINE)"
        case _:
            why = "the hub cannot be reached"
    return CheckpointUnavailable(
        f"{name} at {revision} is not in the local cache, and {why}",
        "connect to the network, or pass a folder: --checkpoint DIR",
    )
