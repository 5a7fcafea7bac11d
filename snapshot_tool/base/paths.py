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
    compiled: the same, compiled by torch.compile.
    paged: with paged attention.
    chunked: the same, with prompts in chunks.
    """

    EAGER = "eager"
    STATIC = "static"
    COMPILED = "compiled"
    PAGED = "paged"
    CHUNKED = "chunked"


_PATH = re.compile(r"eager|static|compiled(:\w+)?|paged|chunked(:[1-9]\d{0,5})?")
_DEFAULTS = {PathKind.COMPILED: "inductor", PathKind.CHUNKED: "64"}


@dataclass(frozen=True, slots=True)
class ExecutionPath:
    """A path; `argument` is the backend of a compiled one, the tokens of a chunk, or ""."""

    kind: PathKind = PathKind.EAGER
    argument: str = ""

    def __str__(self) -> str:
        """Return its name."""
        return f"{self.kind}:{self.argument}" if self.argument else str(self.kind)


EAGER = ExecutionPath()


def parse_path(text: str) -> ExecutionPath:
    """Return the path with a name; raise UsageError for an unknown one."""
    if _PATH.fullmatch(text) is None:
        raise UsageError(
            f"--path {text} is not a valid path",
            "valid paths: eager, static, compiled[:BACKEND], paged, chunked[:N]",
        )
    name, _, argument = text.partition(":")
    kind = PathKind(name)
    return ExecutionPath(kind, argument or _DEFAULTS.get(kind, ""))
