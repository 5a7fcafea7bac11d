"""Options of a command, each declared once: as a field of the command's request.

The command line, the pytest plugin and the Python API use these declarations. Torch is not
imported here, so `--help` and pytest start fast.
"""

from __future__ import annotations

import dataclasses
import shlex
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snapshot_tool.base.errors import UsageError, suggest

DEVICES = ("cpu", "cuda")


@dataclass(frozen=True, slots=True)
class Option:
    """One option.

    Args:
        field: the field's name, which is also the keyword of the Python API: "golden_device".
        help: its help text.
        kind: type of one value: bool for a flag.
        default: the value if the option is not given.
        repeated: whether it may be given several times; the field is then a sequence.
        commas: whether one value may have several names, separated by commas.
        choices: the valid values; empty: any.
        limits: the least and the greatest valid number; None: no limit.
        metavar: placeholder of the value in the help; "": from the type.
        short: the option as one letter: "-x"; "": none.
        in_pytest: whether the pytest plugin has it.
    """

    field: str
    help: str
    kind: type
    default: Any
    repeated: bool
    commas: bool
    choices: tuple[str, ...]
    limits: tuple[Any, Any]
    metavar: str
    short: str
    in_pytest: bool

    @property
    def flag(self) -> str:
        """The option on the command line: "--golden-device"."""
        return f"--{self.field.replace('_', '-')}"


def option(
    default: Any,
    help: str,  # noqa: A002 - as click and argparse name it
    *,
    commas: bool = False,
    choices: Sequence[str] = (),
    limits: tuple[Any, Any] = (None, None),
    metavar: str = "",
    short: str = "",
    in_pytest: bool = True,
) -> Any:
    """Declare a field of a request as an option; see Option."""
    details = {
        "help": help,
        "commas": commas,
        "choices": tuple(map(str, choices)),  # click takes the names of an enum, not its values
        "limits": limits,
        "metavar": metavar,
        "short": short,
        "in_pytest": in_pytest,
    }
    return dataclasses.field(default=default, metadata=details)


def goldens_field() -> Any:
    """Declare --goldens."""
    return option(Path("goldens"), "Folder of the golden sets.", metavar="DIR")


def family_field() -> Any:
    """Declare --family."""
    return option(
        (),
        "File that declares a model family, or the name of an entry point. Its code is run.",
        metavar="FILE.py",
    )


def options_of(request: type) -> dict[str, Option]:
    """Return the options that the fields of a request declare, by the fields' names."""
    hints = typing.get_type_hints(request)
    found = {}
    for field in dataclasses.fields(request):
        hint = hints[field.name]
        if isinstance(hint, types.UnionType):  # int | None, str | Path
            hint = [one for one in typing.get_args(hint) if one is not types.NoneType][-1]
        repeated = typing.get_origin(hint) is Sequence
        kind = typing.get_args(hint)[-1] if repeated else hint
        if isinstance(kind, types.UnionType):
            kind = typing.get_args(kind)[-1]
        found[field.name] = Option(
            field.name, kind=kind, default=field.default, repeated=repeated, **field.metadata
        )
    return found


def command_line(command: str, request: Any) -> str:
    """Return the command that makes a request, as a line for a shell; defaults are left out."""
    words = shlex.split(command)
    for option in options_of(type(request)).values():
        value = getattr(request, option.field)
        for single in value if option.repeated else [value]:
            if option.repeated or str(single) != str(option.default):
                words += [option.flag] if option.kind is bool else [option.flag, str(single)]
    return shlex.join(words)


def normalise_options(request: Any) -> None:
    """Split values at commas, and raise UsageError for one that its option does not take.

    click and pytest refuse most of them earlier; a caller in Python can pass any value.
    """
    for option in options_of(type(request)).values():
        given = getattr(request, option.field)
        if given is None:
            continue
        if option.commas:
            texts = [given] if isinstance(given, str) else given
            given = tuple(name for text in texts for name in text.split(","))
            object.__setattr__(request, option.field, given)  # requests are frozen
        elif option.repeated and isinstance(given, str | Path):
            raise UsageError(f"{option.field} is {given!r}", f"pass a list: [{given!r}]")
        for value in given if option.repeated else [given]:
            if option.choices and value not in option.choices:
                raise UsageError(
                    f"{option.field} is {value!r}", suggest(str(value), option.choices)
                )
            least, most = option.limits
            if (least is not None and value < least) or (most is not None and value > most):
                raise UsageError(
                    f"{option.field} is {value!r}",
                    f"it must be at least {least}" + (f" and at most {most}" if most else ""),
                )
