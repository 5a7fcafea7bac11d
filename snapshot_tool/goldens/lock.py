"""goldens.lock: which golden sets are shared, where, and the digest of every byte of them.

The file is small and lives in git; the sets lie on the remote. What is pulled must be what the lock
says, so a set cannot change without a commit that says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec

from snapshot_tool.base.errors import GoldenNotFound, LockInvalid
from snapshot_tool.base.files import file_sha256
from snapshot_tool.goldens.layout import INPUTS, MANIFEST, SetLocation
from snapshot_tool.goldens.manifest import (
    CheckpointName,
    Count,
    Digest,
    ManifestSummary,
    Positive,
    Revision,
)
from snapshot_tool.goldens.manifest import encode as encode_json

# A name in the set's own folder (or inputs beside it): no folders, nothing hidden.
FileName = Annotated[
    str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9_-]*\.(json|safetensors)\Z", max_length=64)
]


class LockedFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One file: its size in bytes and the SHA-256 of them all."""

    size: Count
    sha256: Digest

    def object_name(self, name: str) -> str:
        """Return what the file is called on a remote: its digest, and the suffix of its name."""
        return self.sha256 + Path(name).suffix


class LockedSet(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One golden set; `files` has its manifest, too."""

    checkpoint: CheckpointName
    revision: Revision
    device: Annotated[str, msgspec.Meta(pattern=r"^(cpu|cuda)\Z")]
    dtype: Annotated[str, msgspec.Meta(pattern=r"^(float32|float64|bfloat16|float16)\Z")]
    golden_version: Positive
    files: dict[FileName, LockedFile]

    def __post_init__(self) -> None:
        """Refuse a set without the files that every set has."""
        for name in (MANIFEST, INPUTS):
            if name not in self.files:
                raise ValueError(f"a set without {name}")

    @property
    def identity(self) -> tuple[str, str, str, str]:
        """What tells the set from all others, whatever its version."""
        return self.checkpoint, self.revision, self.device, self.dtype

    @property
    def title(self) -> str:
        """Name the set as people read it."""
        return f"{self.location(Path())}, golden version {self.golden_version}"

    def location(self, root: Path) -> SetLocation:
        """Return where the set lies below a goldens folder."""
        return SetLocation(root, *self.identity)

    def is_meant(self, part: str) -> bool:
        """Tell whether the set's name, owner/name/revision/device-dtype, contains `part`."""
        return part in f"{self.checkpoint}/{self.revision}/{self.device}-{self.dtype}"

    def describes(self, manifest: ManifestSummary) -> bool:
        """Tell whether a manifest is this set's, and names the same files."""
        entry = manifest.checkpoint
        files = {
            name: LockedFile(size=e.size, sha256=e.sha256) for name, e in manifest.files.items()
        }
        return (
            self.identity == (entry.name, entry.revision, manifest.device, manifest.dtype)
            and self.golden_version == manifest.golden_version
            and files == {name: file for name, file in self.files.items() if name != MANIFEST}
        )


class Lock(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole of goldens.lock."""

    schema: Literal["snap-lock/1"] = "snap-lock/1"
    remote: str
    sets: tuple[LockedSet, ...]

    def __post_init__(self) -> None:
        """Refuse a set that is named twice: which of both is meant?"""
        if len({item.identity for item in self.sets}) < len(self.sets):
            raise ValueError("a set is named twice")

    def merged(self, sets: list[LockedSet], *, remote: str) -> Lock:
        """Return the lock with some sets added or replaced, in a fixed order."""
        by_identity = {item.identity: item for item in (*self.sets, *sets)}
        return Lock(remote=remote, sets=tuple(by_identity[key] for key in sorted(by_identity)))


def lock_set(folder: Path, manifest: ManifestSummary) -> LockedSet:
    """Return the entry of a set whose files are known to be as recorded."""
    path = folder / MANIFEST
    own = LockedFile(size=path.stat().st_size, sha256=file_sha256(path))
    files = {name: LockedFile(size=e.size, sha256=e.sha256) for name, e in manifest.files.items()}
    return LockedSet(
        checkpoint=manifest.checkpoint.name,
        revision=manifest.checkpoint.revision,
        device=manifest.device,
        dtype=manifest.dtype,
        golden_version=manifest.golden_version,
        files={MANIFEST: own, **files},
    )


def lock_path(goldens: Path) -> Path:
    """Return where the lock of a goldens folder lies: beside it, so that git can have the one."""
    folder = goldens if goldens.name else goldens.resolve()
    return folder.with_name(f"{folder.name}.lock")


def load_lock(path: Path) -> Lock:
    """Read and validate a lock; raise LockInvalid, naming the field, where it breaks the schema."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Lock)
    except FileNotFoundError:
        raise GoldenNotFound(
            f"{path} is missing", "snap push writes it; it belongs into git"
        ) from None
    except (OSError, msgspec.DecodeError, RecursionError, ValueError) as error:
        raise LockInvalid(
            f"{path} is no valid lock: {error}", "restore it from version control"
        ) from error


def encode_lock(lock: Lock) -> bytes:
    """Return the lock as JSON with sorted keys: small differences make small diffs in git."""
    return encode_json(lock)
