"""docs/reliability.md, from the figures that `make torture` measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_HEAD = """# Reliability

Written by `make torture` (see `tests/torture/`); the short, seeded versions run in `make test`.
Every figure here is of the last run on one machine; a fault that was not survived would stand under
its table.
"""


def page(figures: Mapping[str, Any]) -> str:
    """Return the page; a part that was not run is said not to have been."""
    parts = [_HEAD]
    for name, write in _PARTS.items():
        found = figures.get(name)
        parts.append(write(found) if found else f"## {name}\n\nNot run.\n")
        for failure in (found or {}).get("failures", [])[:20]:
            parts.append(f"    NOT SURVIVED: {' '.join(str(failure).split())[:400]}\n")
    return "\n".join(parts)


def _kill_points(title: str, found: Mapping[str, Any]) -> str:
    rows = [
        f"| {row['scenario']} | {row['fault']} | {row['points']} of {row['of']} | "
        f"{row['survived']} | {row['old']} | {row['new']} |"
        for row in found["rows"]
    ]
    tried = sum(row["points"] for row in found["rows"])
    survived = sum(row["survived"] for row in found["rows"])
    return "\n".join(
        [
            f"## {title}",
            "",
            f"{tried} points tried, {survived} survived. A point is one write, sync, rename, link "
            "or removal; at it the process is killed (half a write being done), interrupted, or "
            "refused by the system (disk full, read-only, failing). Survived: all files are those "
            "before or all those after, they verify, the message is a line or two, and going on "
            "completes them to the bytes of an undisturbed run.",
            "",
            "| what ran | fault | points | survived | old set found | new set found |",
            "| --- | --- | --- | --- | --- | --- |",
            *rows,
            "",
        ]
    )


def _recording(found: Mapping[str, Any]) -> str:
    return _kill_points("Recording", found)


def _sharing(found: Mapping[str, Any]) -> str:
    return _kill_points("Pulling", found)


def _refused(title: str, found: Mapping[str, Any]) -> str:
    rows = [
        f"| {row['scenario']} | {row['surrounding']} | {row['tried']} | {row['refused']} | "
        f"{row['completed']} |"
        for row in found["rows"]
    ]
    return "\n".join(
        [
            f"## {title} where the system refuses",
            "",
            "Nothing is injected here: a file system in memory that fills up, or was made "
            "read-only; folders without leave to write; few open files (ulimit -n) and small ones "
            "(ulimit -f), in grades from nothing to more than enough. Refused: exit 3 and a line "
            "or two; whatever came of it, all files were those before or all those after, and "
            "going on completed them.",
            "",
            "| what ran | where | tried | refused | completed |",
            "| --- | --- | --- | --- | --- |",
            *rows,
            "",
        ]
    )


def _recording_refused(found: Mapping[str, Any]) -> str:
    return _refused("Recording", found)


def _sharing_refused(found: Mapping[str, Any]) -> str:
    return _refused("Pulling", found)


def _processes(found: Mapping[str, Any]) -> str:
    return (
        "## Whole processes\n\n"
        f"{found['tried']} whole `snap record` processes killed at points spread over their "
        f"writes; {found['survived']} survived and were completed to equal bytes.\n"
    )


def _recorders(found: Mapping[str, Any]) -> str:
    return (
        "## Live recorders\n\n"
        f"{found['updates']} times two `snap record --update` at once at one set: each time one "
        f"wrote it, and {found['told']} of the others were told that another process is recording. "
        f"Meanwhile two processes read the set whole {found['reads']} times, one version or the "
        "other.\n"
    )


def _hostile(found: Mapping[str, Any]) -> str:
    inputs = sum(found[kind] for kind in ("mutated", "drawn", "built", "pictured", "bombs"))
    codes = ", ".join(f"{code}: {count}" for code, count in sorted(found["codes"].items()))
    kinds = [f"| {name.replace('_', ' ')} | {n} |" for name, n in found["mutations"].items()]
    return "\n".join(
        [
            "## Golden sets from strangers",
            "",
            f"{inputs} golden sets tried ({found['mutated']} mutated, {found['drawn']} drawn from "
            f"the schema, {found['built']} with another configuration, which FMS is to build, "
            f"{found['pictured']} with a spoilt PNG, "
            f"{found['bombs']} bombs) in {found['runs']} runs of list, show, verify, diff, check "
            f"and doctor; {len(found['failures'])} of them did what must not be: a "
            "traceback, a fault of snap, an exit code of another meaning, more than two lines of "
            "error, a control character, a write outside the set, a process started, half a "
            "minute of the processor, or no end of memory.",
            "",
            f"Exit codes: {codes} (0: nothing that the command reads was changed, or a set that "
            "is whole; 2: several sets, which one is meant?). Memory grew by at most "
            f"{found['memory_mb']} MB, with bombs by {found['bomb_memory_mb']} MB.",
            "",
            "| mutation | sets |",
            "| --- | --- |",
            *kinds,
            "",
        ]
    )


def _atheris(found: Mapping[str, Any]) -> str:
    runs = ", ".join(f"{row['runs']} of the {row['parser']} parser" for row in found["rows"])
    return f"## Coverage-guided fuzzing\n\natheris: {runs}; nothing but refusals came out.\n"


def _concurrency(found: Mapping[str, Any]) -> str:
    rows = [
        f"| {row['way']} | {row['readers']} | {row['replaced']} | {row['reads']} |"
        for row in found["rows"]
    ]
    return "\n".join(
        [
            "## Several processes at once",
            "",
            "A recorder replaces a set again and again while readers open it and compare every "
            "tensor's bytes with its manifest: each saw one whole version, and none a false alarm. "
            f"{found['checkers']} `snap check` at the same time all passed.",
            "",
            "| folders change places by | readers | replaced | whole reads |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
        ]
    )


def _load(found: Mapping[str, Any]) -> str:
    return (
        "## Load\n\n"
        f"A check of {found['cases']} cases (vision, connector, forward): "
        f"{found['check_seconds']} s, at most {found['peak_mb']} MB of its own, "
        f"{found['growth_mb']} MB more in the last quarter than in the first half.\n"
    )


_PARTS = {
    "recording": _recording,
    "recording-refused": _recording_refused,
    "processes": _processes,
    "sharing": _sharing,
    "sharing-refused": _sharing_refused,
    "concurrency": _concurrency,
    "recorders": _recorders,
    "hostile": _hostile,
    "atheris": _atheris,
    "load": _load,
}
