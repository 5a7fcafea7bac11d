"""Files: reading those that may be a stranger's, and writing so that nothing is lost.

Only regular files are opened, and only JSON of bounded size.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import stat
from io import BufferedReader
from pathlib import Path

from snapshot_tool.base.errors import GoldenDamaged, SnapError

# A set of 10,000 cases needs a third of these.
MAX_JSON_BYTES = 128 * 2**20
MAX_JSON_VALUES = 4_000_000


def open_plain(path: Path) -> BufferedReader:
    """Open a regular file for reading; raise GoldenDamaged if that is not possible."""
    # O_NONBLOCK: opening a pipe does not wait for its other end.
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        raise GoldenDamaged(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise GoldenDamaged(f"{path} cannot be read: {reason}") from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise GoldenDamaged(f"{path} is not a regular file")
    return os.fdopen(descriptor, "rb")


def file_size(file: BufferedReader) -> int:
    """Return the size of an open file in bytes."""
    return os.fstat(file.fileno()).st_size


def require_bounded_json(text: bytes) -> bytes:
    """Return JSON text as it is; raise ValueError if it would fill the memory when parsed.

    A value of two bytes becomes an object of fifty or more. Each has a comma or a bracket.
    """
    if len(text) <= MAX_JSON_VALUES:  # every value takes a byte at least
        return text
    values = text.count(b",") + text.count(b"[") + text.count(b"{")
    if values > MAX_JSON_VALUES:
        raise ValueError(f"it has {values} values, allowed are {MAX_JSON_VALUES}")
    return text


def leaves_root(path: Path, root: Path) -> bool:
    """Return whether links on the way lead out of a folder."""
    if path.parent == root and not path.is_symlink():  # the usual case, without system calls
        return False
    # realpath, since Path.resolve raises for links in a circle.
    return not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_writable(path: Path) -> None:
    """Raise SnapError if a report could not be written to a file; the file is left as it is."""
    there = path if path.exists() else path.parent
    number = 0
    if path.is_dir():
        number = errno.EISDIR
    elif not path.parent.is_dir():
        number = errno.ENOENT
    elif not os.access(there, os.W_OK):
        number = errno.EACCES
    if number:
        raise SnapError(f"cannot write {path}: {os.strerror(number)}", "name another file")


def write_report(path: Path, text: str) -> None:
    """Write a report; raise SnapError if the file cannot be written."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SnapError(f"cannot write {path}: {error.strerror}", "name another file") from error


def make_folder(folder: Path) -> None:
    """Create a folder and its parents; raise SnapError if that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SnapError(f"cannot create {folder}: {error.strerror}") from error


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it holds all of `data` or what it held before."""
    partial = path.with_name(f".{path.name}.partial")
    # A killed write may have left one. "x" follows no link that was put there.
    partial.unlink(missing_ok=True)
    with partial.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut, if the system can sync folders."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def link_or_copy(source: Path | str, target: Path | str) -> None:
    """Give a file a second place by a hard link, or copy it if that is not possible."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
