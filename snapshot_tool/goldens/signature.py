"""Signatures of goldens.lock, whose digests cover every byte of the golden sets.

Keys are those of `ssh-keygen -t ed25519`. The package cryptography does the work (extra `sign`).
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import TYPE_CHECKING

from snapshot_tool.base.errors import LockInvalid, SnapError
from snapshot_tool.goldens.transaction import write_atomically

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


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
