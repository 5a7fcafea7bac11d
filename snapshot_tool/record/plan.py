"""What a recording consists of: the settings, and the cases with their inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from snapshot_tool.base.errors import GoldenDamaged, UsageError
from snapshot_tool.base.phases import Phase
from snapshot_tool.base.processes import Processes, own_part
from snapshot_tool.base.recipes import NamedRecipe
from snapshot_tool.goldens.golden import Golden
from snapshot_tool.goldens.manifest import Draws, Storage
from snapshot_tool.record.staging import Staging


class Settings(msgspec.Struct, frozen=True):
    """What must be the same for an unfinished recording to go on.

    `whole_outputs` are the cases, as globs, of which every module's output is kept whole.
    `prompts` and `long` are further cases that the user named.
    """

    revision: str
    seed: int
    variants: int
    max_new_tokens: int
    phases: tuple[Phase, ...]
    environment: dict[str, str]
    oracle: bool = False
    whole_outputs: tuple[str, ...] = ()
    storage: Storage = Storage.FULL
    prompts: tuple[str, ...] = ()
    long: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Earlier:
    """What is recorded already at the same revision.

    Args:
        replaced: the set that is recorded again, or None.
        siblings: the sets on other devices or in other dtypes, which share the inputs.
    """

    replaced: Golden | None
    siblings: tuple[Golden, ...] = ()

    @property
    def template(self) -> Golden | None:
        """The set whose settings and inputs are taken over, or None."""
        return self.replaced or next(iter(self.siblings), None)


class PlannedCase(msgspec.Struct, frozen=True):
    """A case whose inputs are staged.

    `text` is what its tokenizer was given; `eos_token_ids` end its generation, None for those of
    the set.
    """

    name: str
    origin: str
    recipe: Any
    text: str
    tiles: int
    eos_token_ids: tuple[int, ...] | None = None

    @property
    def named(self) -> NamedRecipe:
        """The case's recipe."""
        fields = {"name": self.name, "origin": self.origin, "recipe": self.recipe}
        return msgspec.convert(fields, NamedRecipe)


class Plan(msgspec.Struct, frozen=True):
    """A recording's settings and cases, how these were drawn, and what was warned of meanwhile."""

    settings: Settings
    cases: tuple[PlannedCase, ...]
    draws: Draws
    warnings: tuple[str, ...] = ()

    def part_for(self, processes: Processes) -> Plan:
        """Return the plan with the cases that this process asks."""
        return msgspec.structs.replace(self, cases=tuple(own_part(self.cases, processes)))


def read_plan(staging: Staging) -> Plan:
    """Return the plan that is staged."""
    try:
        return msgspec.json.decode(staging.plan.read_bytes(), type=Plan)
    except msgspec.DecodeError as error:
        raise GoldenDamaged(
            f"{staging.plan} is no valid plan: {error}", "throw it away with --fresh"
        ) from error


def require_same_settings(old: Settings, new: Settings) -> None:
    """Raise UsageError, naming a setting, unless an unfinished recording can go on."""
    for name in Settings.__struct_fields__:
        before, now = getattr(old, name), getattr(new, name)
        if before != now:
            raise UsageError(
                f"the unfinished recording has another {name}: {_difference(before, now)}",
                "finish it with the settings it began with, or throw it away with --fresh",
            )


def _difference(before: object, now: object) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
        return f"{keys[0]} was {before.get(keys[0])}, is {now.get(keys[0])}"
    return f"it was {before}, is {now}"
