"""The plan of a recording, and the folder in which it is staged until it is complete."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from safetensors.torch import load_file, save

from snapshot_tool.base.errors import GoldenDamaged, GoldenExists, SnapError, UsageError
from snapshot_tool.base.files import make_folder, sync_folder, write_atomically
from snapshot_tool.base.protocol import LoadSettings, Phase
from snapshot_tool.base.recipes import NamedRecipe
from snapshot_tool.goldens.golden import Golden
from snapshot_tool.goldens.layout import TAPS, phase_file
from snapshot_tool.goldens.manifest import Draws, Manifest, Storage
from snapshot_tool.reference import Processes, load_reference

if TYPE_CHECKING:
    from snapshot_tool.reference.huggingface import HuggingFaceReference


@dataclass(frozen=True, slots=True)
class Staging:
    """The folder of one unfinished recording."""

    folder: Path

    @property
    def plan(self) -> Path:
        """The file with the plan."""
        return self.folder / "plan.json"

    @property
    def tree(self) -> Path:
        """The new revision folder, as it is assembled."""
        return self.folder / "tree"

    @property
    def parts(self) -> Path:
        """The folder of all parts."""
        return self.folder / "parts"

    def part(self, case: str, file: str) -> Path:
        """Return a case's part of one file of the set."""
        return self.parts / case / file

    def load_part(self, case: str, file: str) -> dict[str, torch.Tensor]:
        """Return a case's tensors of one file; none if it is not staged."""
        path = self.part(case, file)
        return load_file(path) if path.exists() else {}

    def save_part(self, case: str, file: str, tensors: dict[str, torch.Tensor]) -> None:
        """Write a case's tensors of one file, atomically."""
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        self.save_bytes(case, file, save(contiguous))

    def save_bytes(self, case: str, file: str, data: bytes) -> None:
        """Write a case's part of one file, atomically."""
        path = self.part(case, file)
        make_folder(path.parent)
        try:
            write_atomically(path, data)
        except OSError as error:
            raise SnapError(
                f"cannot write {path}: {error.strerror}",
                "free disk space, then continue with --resume",
            ) from error

    def count_cases(self) -> int:
        """Return how many cases have their answers; a recording may have one of both files."""
        names = (TAPS, phase_file(Phase.GENERATE))
        counts = [len(list(self.folder.glob(f"parts/*/{name}"))) for name in names]
        return min(filter(None, counts), default=0)

    def discard(self) -> None:
        """Remove everything. The rename makes it one step if the process is killed midway."""
        rest = self.folder.with_name(f"{self.folder.name}.discarded")
        shutil.rmtree(rest, ignore_errors=True)
        self.folder.rename(rest)
        sync_folder(self.folder.parent)
        shutil.rmtree(rest, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Recording:
    """What all processes of a recording have in common.

    Args:
        checkpoint: the folder of its files.
        dtype: of the reference, whose outputs are recorded.
        allows_nan: whether outputs may contain NaN or Inf.
    """

    staging: Staging
    checkpoint: Path
    dtype: str
    allows_nan: bool
    load: LoadSettings

    def load_reference(self, dtype: str) -> HuggingFaceReference:
        """Load the reference in a dtype."""
        return load_reference(self.checkpoint, dtype=dtype, settings=self.load)


class Settings(msgspec.Struct, frozen=True):
    """The settings that a resumed recording must not change.

    `whole_outputs` are globs of the cases that keep every module's output whole, `modules` of those
    that keep the input, too. `prompts` and `long` are further cases that the user named.
    """

    revision: str
    seed: int
    variants: int
    max_new_tokens: int
    phases: tuple[Phase, ...]
    environment: dict[str, str]
    oracle: bool = False
    whole_outputs: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    storage: Storage = Storage.FULL
    prompts: tuple[str, ...] = ()
    long: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Earlier:
    """The golden sets that exist at the same revision.

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

    def require_shared_inputs(self, are_same: Callable[[Manifest], bool]) -> None:
        """Raise GoldenExists, naming a sibling, if its inputs are not those of the recording."""
        for sibling in self.siblings:
            if not are_same(sibling.manifest):
                raise GoldenExists(
                    f"{sibling.manifest.title} shares the inputs of this revision, and these would "
                    "change them",
                    "record the same cases in the same storage, or remove it first",
                )


class PlannedCase(msgspec.Struct, frozen=True):
    """A case whose inputs are staged.

    `text` is the tokenizer's input. `eos_token_ids` end its generation; None for those of the set.
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
    """Settings and cases, how the cases were drawn, and the warnings up to here."""

    settings: Settings
    cases: tuple[PlannedCase, ...]
    draws: Draws
    warnings: tuple[str, ...] = ()

    def share_of(self, processes: Processes) -> Plan:
        """Return the plan with only the cases of this process."""
        return msgspec.structs.replace(self, cases=self.cases[processes.index :: processes.count])


def read_plan(staging: Staging) -> Plan:
    """Return the staged plan; raise GoldenDamaged if it is not valid."""
    try:
        return msgspec.json.decode(staging.plan.read_bytes(), type=Plan)
    except msgspec.DecodeError as error:
        raise GoldenDamaged(
            f"{staging.plan} is not a valid plan: {error}", "throw it away with --fresh"
        ) from error


def require_same_settings(old: Settings, new: Settings) -> None:
    """Raise UsageError, naming a setting, if a resumed recording would change it."""
    for name in Settings.__struct_fields__:
        before, now = getattr(old, name), getattr(new, name)
        if before == now:
            continue
        what = "it"
        if name == "environment":
            what = min(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
            before, now = before.get(what), now.get(what)
        raise UsageError(
            f"the unfinished recording has another {name}: {what} was {before}, is {now}",
            "finish it with the settings it began with, or throw it away with --fresh",
        )
