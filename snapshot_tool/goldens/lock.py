"""goldens.lock: which golden sets a remote has, with the digest of every file; and its signature.

Keys are those of `ssh-keygen -t ed25519`. The package cryptography does the work (extra `sign`).
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec

from snapshot_tool.base.errors import GoldenDamaged, GoldenNotFound, LockInvalid, SnapError
from snapshot_tool.base.files import file_sha256, write_atomically
from snapshot_tool.goldens.layout import INPUTS, MANIFEST, SetLocation
from snapshot_tool.goldens.manifest import (
    CheckpointName,
    Count,
    Device,
    Digest,
    Dtype,
    Manifest,
    Positive,
    Revision,
)

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

# A name in the set's own folder (or inputs beside it): no folders, nothing hidden.
FileName = Annotated[
    str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9_-]*\.(json|safetensors)\Z", max_length=64)
]


class LockedFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One file: its size in bytes and the SHA-256 of them all."""

    size: Count
    sha256: Digest

    def object_name(self, name: str) -> str:
        """Return the file's name on a remote: its digest, and the suffix of its name here."""
        return self.sha256 + Path(name).suffix


class LockedSet(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One golden set; `files` includes its manifest."""

    checkpoint: CheckpointName
    revision: Revision
    device: Device
    dtype: Dtype
    golden_version: Positive
    files: dict[FileName, LockedFile]

    def __post_init__(self) -> None:
        """Refuse a set without the files that every set has."""
        for name in (MANIFEST, INPUTS):
            if name not in self.files:
                raise ValueError(f"a set without {name}")

    @property
    def identity(self) -> tuple[str, str, str, str]:
        """What distinguishes the set from all others, in any version."""
        return self.checkpoint, self.revision, self.device, self.dtype

    @property
    def title(self) -> str:
        """The set's name for messages."""
        return f"{self.location(Path())}, golden version {self.golden_version}"

    def location(self, root: Path) -> SetLocation:
        """Return where the set lies below a goldens folder."""
        return SetLocation(root, *self.identity)

    def is_meant(self, part: str) -> bool:
        """Return whether the set's name, owner/name/revision/device-dtype, contains `part`."""
        return part in f"{self.checkpoint}/{self.revision}/{self.device}-{self.dtype}"


class Lock(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole of goldens.lock."""

    schema: Literal["snap-lock/1"] = "snap-lock/1"
    remote: str
    sets: tuple[LockedSet, ...]

    def __post_init__(self) -> None:
        """Refuse a set that is named twice."""
        if len({item.identity for item in self.sets}) < len(self.sets):
            raise ValueError("a set is named twice")


def lock_path(goldens: Path) -> Path:
    """Return the path of a goldens folder's lock: beside it, so that git can keep it alone."""
    folder = goldens if goldens.name else goldens.resolve()
    return folder.with_name(f"{folder.name}.lock")


def lock_set(folder: Path, manifest: Manifest) -> LockedSet:
    """Return the entry of a set whose files are known to be as recorded."""
    if INPUTS not in manifest.files:
        raise GoldenDamaged(f"the manifest in {folder} names no {INPUTS}")
    path, checkpoint = folder / MANIFEST, manifest.checkpoint
    own = LockedFile(size=path.stat().st_size, sha256=file_sha256(path))
    files = {n: LockedFile(size=e.size, sha256=e.sha256) for n, e in manifest.files.items()}
    return LockedSet(
        checkpoint=checkpoint.name,
        revision=checkpoint.revision,
        device=manifest.device,
        dtype=manifest.dtype,
        golden_version=manifest.golden_version,
        files={MANIFEST: own, **files},
    )


def load_lock(path: Path) -> Lock:
    """Read and validate a lock; raise LockInvalid, naming the field, if it breaks the schema."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Lock)
    except FileNotFoundError:
        raise GoldenNotFound(f"{path} is missing", "snap push writes it; keep it in git") from None
    except (OSError, msgspec.DecodeError, RecursionError, ValueError) as error:
        raise LockInvalid(
            f"{path} is not a valid lock: {error}", "restore it from version control"
        ) from error


def signature_path(lock: Path) -> Path:
    """Return the file beside a lock that holds its signature."""
    return lock.with_name(f"{lock.name}.sig")


def read_private_key(key: Path) -> Ed25519PrivateKey:
    """Return the private key in a file; raise SnapError if it cannot sign."""
    try:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_ssh_private_key
    except ImportError as error:
        raise _lacking() from error
    try:
        private = load_ssh_private_key(_read(key), password=None)
    except (ValueError, TypeError) as error:  # TypeError: it has a passphrase
        raise _unusable(key, error) from error
    if not isinstance(private, Ed25519PrivateKey):
        raise _unusable(key, "it is of another kind")
    return private


def sign(lock: Path, key: Ed25519PrivateKey) -> None:
    """Write the signature of a lock."""
    signature = base64.b64encode(key.sign(lock.read_bytes()))
    write_atomically(signature_path(lock), signature + b"\n")


def require_signed(lock: Path, key: Path) -> None:
    """Raise LockInvalid unless a lock was signed with the partner of a public key."""
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import load_ssh_public_key
    except ImportError as error:
        raise _lacking() from error
    try:
        public = load_ssh_public_key(_read(key))
    except ValueError as error:
        raise _unusable(key, error) from error
    if not isinstance(public, Ed25519PublicKey):
        raise _unusable(key, "it is of another kind")
    path = signature_path(lock)
    try:
        public.verify(base64.b64decode(path.read_bytes()), lock.read_bytes())
    except FileNotFoundError as missing:
        raise LockInvalid(
            f"{missing.filename} is missing", "snap push --sign KEY writes it; keep it in git"
        ) from None
    except (InvalidSignature, ValueError) as error:
        raise LockInvalid(
            f"{lock} is not what was signed with the key of {key}",
            "restore it and its .sig from version control, or sign it: snap push --sign KEY",
        ) from error


def _read(key: Path) -> bytes:
    try:
        return key.read_bytes()
    except OSError as error:
        raise SnapError(
            f"{key} cannot be read: {error.strerror}", "name a file with a key"
        ) from error


def _unusable(key: Path, why: object) -> SnapError:
    return SnapError(
        f"{key} is not a usable key: {why}",
        "make a pair without a passphrase: ssh-keygen -t ed25519 -N '' -f snap-key",
    )


def _lacking() -> SnapError:
    return SnapError(
        "signatures need the package cryptography, which is not installed here",
        "in a checkout of snap: pip install '.[sign]'",
    )
