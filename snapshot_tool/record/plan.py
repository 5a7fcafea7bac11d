"""What a recording consists of: the settings, and the cases with their inputs."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from snapshot_tool.base.environment import Processes, own_part
from snapshot_tool.base.errors import GoldenDamaged, SnapError, UsageError
from snapshot_tool.base.phases import Phase
from snapshot_tool.base.recipes import NamedRecipe
from snapshot_tool.goldens.golden import Golden
from snapshot_tool.goldens.manifest import Draws, Storage
from snapshot_tool.goldens.transaction import make_folder, sync_folder, write_atomically

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Staging:
    """The folder of one unfinished recording."""

    folder: Path

    @property
    def plan(self) -> Path:
        """The file that says what is being recorded."""
        return self.folder / "plan.json"

    @property
    def tree(self) -> Path:
        """The new revision folder, as it is assembled."""
        return self.folder / "tree"

    @property
    def offload(self) -> Path:
        """Where accelerate puts weights that fit no device; nothing of it is kept."""
        return self.folder.with_name(f"{self.folder.name}.offload")

    def part(self, case: str, file: str) -> Path:
        """Return a case's part of one file of the set."""
        return self.folder / "parts" / case / file

    def save_part(self, case: str, file: str, tensors: dict[str, torch.Tensor]) -> None:
        """Write a case's tensors of one file, atomically."""
        from safetensors.torch import save

        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        self.save_bytes(case, file, save(contiguous))

    def save_bytes(self, case: str, file: str, data: bytes) -> None:
        """Write a case's part as it is, atomically."""
        path = self.part(case, file)
        make_folder(path.parent)
        try:
            write_atomically(path, data)
        except OSError as error:
            raise SnapError(
                f"cannot write {path}: {error.strerror}", "make room, then go on with --resume"
            ) from error

    def forget_offload(self) -> None:
        """Remove what accelerate put on disk."""
        shutil.rmtree(self.offload, ignore_errors=True)

    def forget_parts(self) -> None:
        """Remove the answers: those of another plan, or of none, answer nothing here."""
        shutil.rmtree(self.folder / "parts", ignore_errors=True)

    def discard(self) -> None:
        """Remove everything, in one step: killed midway, a half must not look like a whole."""
        rest = self.folder.with_name(f"{self.folder.name}.discarded")
        shutil.rmtree(rest, ignore_errors=True)
        self.folder.rename(rest)
        sync_folder(self.folder.parent)
        shutil.rmtree(rest, ignore_errors=True)


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
