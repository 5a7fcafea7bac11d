"""Paths: the ways in which FMS runs a loaded model, by their names on the command line."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from snapshot_tool.base.errors import UsageError


class PathKind(StrEnum):
    """How FMS runs a model.

    eager: as it is written, prompts as they are.
    static: prompts padded on the left to a multiple of 64 tokens.
    paged: with paged attention.
    chunked: the same, with prompts in chunks.
    """

    EAGER = "eager"
    STATIC = "static"
    PAGED = "paged"
    CHUNKED = "chunked"


_PATH = re.compile(r"eager|static|paged|chunked(:[1-9]\d{0,5})?")
_CHUNK = 64


@dataclass(frozen=True, slots=True)
class ExecutionPath:
    """A path; `chunk` is the number of tokens in a chunk of a chunked one, else 0."""

    kind: PathKind = PathKind.EAGER
    chunk: int = 0

    def __str__(self) -> str:
        """Return its name."""
        return f"{self.kind}:{self.chunk}" if self.chunk else str(self.kind)


EAGER = ExecutionPath()


def parse_path(text: str) -> ExecutionPath:
    """Return the path with a name; raise UsageError for an unknown one."""
    if _PATH.fullmatch(text) is None:
        raise UsageError(
            f"--path {text} is not a valid path", "valid paths: eager, static, paged, chunked[:N]"
        )
    kind, _, chunk = text.partition(":")
    if kind == PathKind.CHUNKED:
        return ExecutionPath(PathKind.CHUNKED, int(chunk or _CHUNK))
    return ExecutionPath(PathKind(kind))
