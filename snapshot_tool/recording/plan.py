"""What a recording consists of: the settings, and the cases with their inputs.

Recipes come from an earlier recording where there is one with the same seed and number of variants:
hypothesis's draws may change with its version, the stored recipes do not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from snapshot_tool.core.errors import GoldenDamaged, InputRefused, ReferenceUnavailable, UsageError
from snapshot_tool.core.interfaces import Progress, Reference
from snapshot_tool.core.phases import Phase
from snapshot_tool.core.processes import Processes, own_part
from snapshot_tool.core.recipes import InputKind, NamedRecipe, fixed_cases
from snapshot_tool.core.text import printable
from snapshot_tool.images import render
from snapshot_tool.recording.staging import Staging
from snapshot_tool.store import parts
from snapshot_tool.store.layout import INPUTS, phase_file
from snapshot_tool.store.manifest import Draws, Manifest, Storage, case_recipe, to_builtins
from snapshot_tool.store.packed import pack_inputs
from snapshot_tool.store.transaction import write_atomically

_MAX_ATTEMPTS = 50


class Settings(msgspec.Struct, frozen=True):
    """What must be the same for an unfinished recording to go on.

    `whole_outputs` are the cases, as globs, of which every module's output is kept whole.
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


class PlannedCase(msgspec.Struct, frozen=True):
    """A case whose inputs are staged; `text` is what its tokenizer was given."""

    name: str
    origin: str
    recipe: Any
    text: str
    tiles: int

    @property
    def named(self) -> NamedRecipe:
        """The case's recipe."""
        fields = {"name": self.name, "origin": self.origin, "recipe": self.recipe}
        return msgspec.convert(fields, NamedRecipe)


class Plan(msgspec.Struct, frozen=True):
    """A recording's settings and cases, and how the cases were drawn."""

    settings: Settings
    cases: tuple[PlannedCase, ...]
    draws: Draws

    def part_for(self, processes: Processes) -> Plan:
        """Return the plan with the cases that this process asks."""
        return msgspec.structs.replace(self, cases=tuple(own_part(self.cases, processes)))


def make_plan(
    staging: Staging,
    settings: Settings,
    *,
    reference: Reference,
    template: Manifest | None,
    progress: Progress,
) -> Plan:
    """Return the plan that is staged, or draw or rebuild the cases and stage their inputs."""
    if staging.plan.exists():
        plan = read_plan(staging)
        _require_same_settings(plan.settings, settings)
        return plan
    staging.forget_parts()
    planner = _Planner(staging, reference, progress, settings.storage)
    wanted = (settings.seed, settings.variants)
    if template and (template.seed, template.draws.variants) == wanted:
        plan = Plan(settings, planner.rebuild(template), template.draws)
    else:
        plan = Plan(settings, *planner.draw(seed=settings.seed, variants=settings.variants))
    write_atomically(staging.plan, msgspec.json.encode(plan))
    return plan


def read_plan(staging: Staging) -> Plan:
    """Return the plan that is staged."""
    try:
        return msgspec.json.decode(staging.plan.read_bytes(), type=Plan)
    except msgspec.DecodeError as error:
        raise GoldenDamaged(
            f"{staging.plan} is no valid plan: {error}", "throw it away with --fresh"
        ) from error


@dataclass(frozen=True, slots=True)
class _Planner:
    """Makes cases, and stages what the reference's processor makes of them."""

    staging: Staging
    reference: Reference
    progress: Progress
    storage: Storage

    def rebuild(self, template: Manifest) -> tuple[PlannedCase, ...]:
        """Prepare the cases of an earlier recording."""
        recipes = [case_recipe(case) for case in template.cases]
        with self.progress.stage("preparing cases", len(recipes)) as steps:
            return tuple(self._rebuild_case(recipe, steps) for recipe in recipes)

    def _rebuild_case(self, recipe: NamedRecipe, steps: Iterator[int]) -> PlannedCase:
        try:
            return self._prepare(recipe, steps)
        except InputRefused as refusal:
            raise ReferenceUnavailable(
                f"the reference refuses case {recipe.name}, which another release took: {refusal}",
                "record anew in another --goldens folder, or with another --variants",
            ) from refusal

    def draw(self, *, seed: int, variants: int) -> tuple[tuple[PlannedCase, ...], Draws]:
        """Prepare the fixed cases and draw the variants."""
        reasons: dict[str, int] = {}
        fixed = fixed_cases(self._kind())
        with self.progress.stage("drawing cases", len(fixed) + variants) as steps:
            cases = [self._prepare(recipe, steps) for recipe in fixed]
            cases += [self._draw_case(seed, index, reasons, steps) for index in range(variants)]
        draws = Draws(variants=variants, refused=sum(reasons.values()), reasons=reasons)
        return tuple(cases), draws

    def _kind(self) -> InputKind:
        phases = self.reference.info().phases
        return InputKind.of(text=Phase.FORWARD in phases, images=Phase.VISION in phases)

    def _draw_case(
        self, seed: int, index: int, reasons: dict[str, int], steps: Iterator[int]
    ) -> PlannedCase:
        """Draw a variant until the reference takes it, counting what it refused."""
        from snapshot_tool.variants.recorded import draw_recipe

        for attempt in range(_MAX_ATTEMPTS):
            recipe = draw_recipe(seed=seed, index=index, attempt=attempt, kind=self._kind())
            try:
                return self._prepare(
                    NamedRecipe(f"variant-{index + 1:02}", "variant", recipe), steps
                )
            except InputRefused as refusal:
                reason = printable(str(refusal))
                reasons[reason] = reasons.get(reason, 0) + 1
        raise ReferenceUnavailable(
            f"the reference refused {_MAX_ATTEMPTS} draws of variant {index + 1}, the last for: "
            f"{list(reasons)[-1]}",
            "record with another --seed or fewer --variants",
        )

    def _prepare(self, named: NamedRecipe, steps: Iterator[int]) -> PlannedCase:
        images = [render(image) for image in named.recipe.images]
        prepared = self.reference.prepare(named.recipe, images)
        tensors = parts.input_tensors(prepared, images)
        if self.storage is Storage.COMPACT:
            tensors = pack_inputs(tensors, prepared.image_cuts)
        self.staging.save_part(named.name, INPUTS, tensors)
        if images:
            grids = {"image_grids": prepared.image_grids}
            self.staging.save_part(named.name, phase_file(Phase.PREPROCESSING), grids)
        next(steps)
        pixels = prepared.inputs.pixel_values
        tiles = 0 if pixels is None else len(pixels)
        recipe = to_builtins(named.recipe)
        return PlannedCase(named.name, named.origin, recipe, prepared.text, tiles)


def _require_same_settings(old: Settings, new: Settings) -> None:
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
