"""Defaults of options: the table [tool.snap] of pyproject.toml, and SNAP_* variables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from snapshot_tool.base.errors import UsageError, suggest
from snapshot_tool.base.options import Option, options_of

_TABLE = "tool.snap"
# Options that mean the same in every command. The others are those of check and record.
_SHARED = ("goldens", "fms_path", "family", "device")


def environment_variable(option: Option) -> str | None:
    """Return the name of an option's variable.

    None for the revision: Ubuntu's snap sets SNAP_REVISION for programs inside a package.
    """
    return None if option.field == "revision" else f"SNAP_{option.field.upper()}"


def read_defaults(commands: Mapping[str, object]) -> dict[str, dict[str, Any]]:
    """Return the defaults of each command from the nearest pyproject.toml, for click's default_map.

    A table [tool.snap.COMMAND] is for one command. Relative paths are relative to the file.
    Raises UsageError for an option that does not exist.
    """
    here = Path.cwd()
    folders = (folder for folder in (here, *here.parents) if (folder / "pyproject.toml").is_file())
    folder = next(folders, None)
    if folder is None:
        return {}
    path = folder / "pyproject.toml"
    text = path.read_text(encoding="utf-8", errors="replace")
    if f"[{_TABLE}" not in text:
        return {}
    import tomllib

    try:
        table = tomllib.loads(text).get("tool", {}).get("snap", {})
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is not valid TOML: {error}", "correct the file") from error
    if not isinstance(table, dict) or not all(
        isinstance(table.get(command, {}), dict) for command in commands
    ):
        raise UsageError(
            f"{path}: [{_TABLE}] and [{_TABLE}.COMMAND] must be tables", "correct the file"
        )
    common = {name: value for name, value in table.items() if name not in commands}
    return {
        command: _defaults({**common, **table.get(command, {})}, command, path)
        for command in commands
    }


def _defaults(table: dict[str, Any], command: str, path: Path) -> dict[str, Any]:
    """Return the values of a command's options, by field."""
    from snapshot_tool.check.request import CheckRequest
    from snapshot_tool.record.request import RecordRequest

    known = {**options_of(RecordRequest), **options_of(CheckRequest)}
    requests = {"check": CheckRequest, "judge": CheckRequest, "record": RecordRequest}
    taken = options_of(requests[command]) if command in requests else _SHARED
    folder = "" if path.parent == Path.cwd() else path.parent
    defaults = {}
    for name, value in table.items():
        option = known.get(name.replace("-", "_"))
        if option is None:
            flags = [one.flag[2:] for one in known.values()]
            raise UsageError(f"{path}: unknown option {name} in [{_TABLE}]", suggest(name, flags))
        if option.field not in taken:
            continue
        values = value if isinstance(value, list) else [value]
        if option.kind is Path or str(value).endswith(".py"):
            values = [str(Path(folder, str(one))) for one in values]
        defaults[option.field] = values if option.repeated else values[0]
    return defaults


def configured_options(context: click.Context) -> str:
    """Return the options from variables or pyproject.toml, each with its source; "" if none."""
    found = []
    for option in context.command.params:
        source = context.get_parameter_source(str(option.name))
        value = context.params.get(str(option.name))
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
        if source is ParameterSource.DEFAULT_MAP:
            found.append(f"{option.opts[0]} {shown} (pyproject.toml)")
        elif source is ParameterSource.ENVIRONMENT:
            found.append(f"{option.opts[0]} {shown} ({option.envvar})")
    return ", ".join(found)
