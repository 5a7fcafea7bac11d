"""A forked process with mounts of its own, for root and for anybody else; and one without powers.

Where the system lets nobody but root mount, a process is root in a user namespace of its own.
"""

from __future__ import annotations

import ctypes
import json
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_NEW_MOUNTS = 0x00020000  # CLONE_NEWNS
_NEW_USERS = 0x10000000  # CLONE_NEWUSER
_READ_ONLY, _REMOUNT, _RECURSIVE, _PRIVATE = 1, 32, 0x4000, 1 << 18
_CAPABILITIES_3 = 0x20080522
_LIBC = ctypes.CDLL(None, use_errno=True)


class MountRefusedError(Exception):
    """This system lets neither us nor a user namespace of ours mount."""


def call_with_mounts(job: Callable[[], Any]) -> Any:
    """Return what a job returned (JSON) in a forked process whose mounts nobody else sees.

    Raises MountRefusedError where mounting is not permitted, RuntimeError where the job raised.
    """
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ours)
        answer: dict[str, Any]
        try:
            _take_own_mounts()
            answer = {"returned": job()}
        except _RefusalError as error:
            answer = {"refused": str(error)}
        except BaseException:
            answer = {"raised": traceback.format_exc()}
        with os.fdopen(theirs, "w") as pipe:
            json.dump(answer, pipe)
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as pipe:
        answer = json.loads(pipe.read() or '{"raised": "the process died"}')
    os.waitpid(child, 0)
    if "refused" in answer:
        raise MountRefusedError(answer["refused"])
    if "raised" in answer:
        raise RuntimeError(answer["raised"])
    return answer["returned"]


class _RefusalError(Exception):
    """The system refused a namespace or a mount."""


def _checked(result: int, doing: str) -> None:
    if result != 0:
        raise _RefusalError(f"{doing}: {os.strerror(ctypes.get_errno())}")


def _take_own_mounts() -> None:
    user, group = os.geteuid(), os.getegid()
    if user == 0 and _LIBC.unshare(_NEW_MOUNTS) == 0:
        pass
    else:
        _checked(_LIBC.unshare(_NEW_USERS | _NEW_MOUNTS), "unshare")
        for file, text in (
            ("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1"),
        ):  # fmt: skip
            try:
                Path("/proc/self", file).write_text(text, encoding="utf-8")
            except OSError as error:
                raise _RefusalError(f"{file}: {error.strerror}") from error
    _checked(_LIBC.mount(None, b"/", None, _RECURSIVE | _PRIVATE, None), "mount")


def mount_memory(folder: Path, *, size: int) -> None:
    """Mount a file system of `size` bytes in memory on a folder."""
    options = f"size={size},mode=755".encode()
    _checked(_LIBC.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, options), "mount")


def resize_memory(folder: Path, *, size: int) -> None:
    """Give a file system in memory another size, and make it writable."""
    options = f"size={size}".encode()
    _checked(_LIBC.mount(None, os.fsencode(folder), None, _REMOUNT, options), "remount")


def make_read_only(folder: Path) -> None:
    """Make a mounted file system read-only."""
    _checked(_LIBC.mount(None, os.fsencode(folder), None, _REMOUNT | _READ_ONLY, None), "remount")


def drop_powers() -> None:
    """Give up what root may do beyond others, for the rest of this process: modes count again."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES_3, 0)
    none = (ctypes.c_uint32 * 6)()
    if _LIBC.capset(header, none) != 0:
        raise OSError(ctypes.get_errno(), "capset")
