"""Where golden files are shared: a dataset of the hub, a prefix on S3, or a folder.

Files are `<remote>/objects/<SHA-256>.<suffix>`: the same bytes are sent once, all versions of a set
can be side by side, and an object is never overwritten by another one.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fsspec.callbacks import Callback

from snapshot_tool.base.errors import RemoteUnavailable, UsageError
from snapshot_tool.base.protocol import Progress

BLOCK = 8 * 2**20  # bytes
_MEGABYTE = 10**6
_SEGMENT = r"(?!\.{1,2}(/|\Z))[A-Za-z0-9._-]+"
_PREFIX = rf"(/{_SEGMENT})*/?"
_REMOTES = (
    re.compile(rf"hf://datasets/[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*{_PREFIX}"),
    re.compile(rf"s3://[a-z0-9][a-z0-9.-]+[a-z0-9]{_PREFIX}"),
    # Any folder without "..", control characters, or what URLs give a meaning.
    re.compile(r"file:///(?!(.*/)?\.\.(/|\Z))[^\x00-\x1f\x7f:?#]*"),
)

Advance = Callable[[int], None]


def clean_remote(url: str) -> str:
    """Return a remote's address without a slash at its end; raise UsageError for any other form.

    No passwords, no chained protocols, no "..": the address is kept in goldens.lock, which may come
    from a stranger.
    """
    if not any(form.fullmatch(url) for form in _REMOTES):
        raise UsageError(
            f"unsupported remote URL {url!r}",
            "use hf://datasets/OWNER/NAME, s3://BUCKET/PREFIX or file:///FOLDER",
        )
    return url.rstrip("/")


@dataclass(frozen=True, slots=True)
class Remote:
    """An open remote; every error of its client becomes RemoteUnavailable."""

    url: str
    _files: Any = field(repr=False)
    _root: str = field(repr=False)

    def sizes(self) -> dict[str, int]:
        """Return the size in bytes of every object that is there, by name."""
        from huggingface_hub.errors import EntryNotFoundError

        with self._reach("list"):
            try:
                found = self._files.find(f"{self._root}/objects", detail=True)
            except EntryNotFoundError:  # the hub's way to say that nothing was pushed yet
                return {}
            return {path.rpartition("/")[2]: int(info["size"]) for path, info in found.items()}

    def upload(self, path: Path, name: str, advance: Advance) -> None:
        """Write a file as the object `name`."""
        target = f"{self._root}/objects/{name}"
        with self._reach("write to"):
            if self.url.startswith("file:"):
                self._files.put_file(str(path), f"{target}.partial")
                self._files.mv(f"{target}.partial", target)
                advance(path.stat().st_size)
            else:
                self._files.put_file(str(path), target, callback=_Advancing(advance))

    def blocks(self, name: str, *, start: int, size: int) -> Iterator[bytes]:
        """Yield an object's bytes from `start` on, until there are `size` of them or it ends."""
        with self._reach("read from"):
            path = f"{self._root}/objects/{name}"
            with self._files.open(path, "rb", block_size=BLOCK) as source:
                source.seek(start)
                left = size - start
                while left and (block := source.read(min(BLOCK, left))):
                    left -= len(block)
                    yield block

    @contextmanager
    def _reach(self, deed: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # each file system raises its own client's errors
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise RemoteUnavailable(
                f"cannot {deed} {self.url}: {reason}",
                "check that it exists, and that the credentials in the environment may do this",
            ) from error


class _Advancing(Callback):  # type: ignore[misc]
    """Counts the bytes of each block that was written."""

    def __init__(self, advance: Advance) -> None:
        super().__init__()
        self._advance = advance

    def relative_update(self, inc: int = 1) -> None:
        """Count `inc` bytes."""
        self._advance(inc)


def open_remote(url: str) -> Remote:
    """Open a remote by its address; no request is sent yet."""
    from fsspec.core import url_to_fs

    url = clean_remote(url)
    if url.startswith("hf:"):
        # The hub's client draws progress bars of its own, and logs each retry.
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    options = {"auto_mkdir": True} if url.startswith("file:") else {}
    try:
        # No caches, since others may push meanwhile.
        files, root = url_to_fs(url, skip_instance_cache=True, use_listings_cache=False, **options)
    except ImportError as error:
        raise RemoteUnavailable(
            f"{url} needs a package that is not installed here: {error.name}",
            "in a checkout of snap: pip install '.[s3]'",
        ) from error
    return Remote(url, files, root.rstrip("/"))


@contextmanager
def count_megabytes(progress: Progress, title: str, sizes: list[int]) -> Iterator[Advance]:
    """Open a stage whose steps are megabytes; yield what counts the bytes."""
    total = math.ceil(sum(sizes) / _MEGABYTE)
    done = counted = 0
    with progress.stage(title, total) as steps:

        def advance(size: int) -> None:
            nonlocal done, counted
            done += size
            while counted < min(done // _MEGABYTE, total):
                next(steps)
                counted += 1

        yield advance
        # The last one is rarely full.
        while counted < total:
            next(steps)
            counted += 1
