"""Making a recording's cases: draw them, or take over those of an earlier recording.

Inputs of an earlier recording are taken over as they are: the text, the ids and the pixels. A date
in a chat template, another tokenizer or another Pillow would change them; that is reported, and
changes nothing.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import msgspec

from snapshot_tool.base.errors import (
    GoldenDamaged,
    GoldenExists,
    InputRefused,
    ReferenceUnavailable,
    TemplateRefused,
    UsageError,
    printable,
)
from snapshot_tool.base.images import render
from snapshot_tool.base.phases import Phase
from snapshot_tool.base.protocol import CaseInputs, PreparedCase, Progress, Reference
from snapshot_tool.base.recipes import (
    END_PROMPTS,
    FIXED_CASES,
    IMAGE_TOKEN,
    CaseRecipe,
    ImageRecipe,
    InputKind,
    NamedRecipe,
    fixed_cases,
)
from snapshot_tool.goldens import parts
from snapshot_tool.goldens.golden import Golden
from snapshot_tool.goldens.layout import INPUTS, phase_file
from snapshot_tool.goldens.manifest import CaseEntry, Draws, Storage, case_recipe, to_builtins
from snapshot_tool.goldens.packed import pack_inputs, unpack_inputs
from snapshot_tool.goldens.transaction import write_atomically
from snapshot_tool.record.plan import (
    Earlier,
    Plan,
    PlannedCase,
    Settings,
    Staging,
    read_plan,
    require_same_settings,
)

if TYPE_CHECKING:
    import torch
    from PIL import Image

_MAX_ATTEMPTS = 50
_END, _PROMPT, _LONG = "end-token", "prompt", "long"
_GRIDS = "image_grids"


def make_plan(
    staging: Staging,
    settings: Settings,
    *,
    reference: Reference,
    earlier: Earlier,
    redraw: bool,
    progress: Progress,
) -> Plan:
    """Return the plan that is staged, or draw or take over the cases and stage their inputs.

    redraw: draw the cases even if an earlier recording has them.
    """
    if staging.plan.exists():
        plan = read_plan(staging)
        require_same_settings(plan.settings, settings)
        return plan
    staging.forget_parts()
    maker = _CaseMaker(staging, settings, reference, progress)
    template = earlier.template
    if template and not redraw and _keeps_cases(template, settings):
        cases = maker.take_over(template, replaced=earlier.replaced)
        draws = template.manifest.draws
    else:
        cases, draws = maker.draw()
    cases = (*cases, *maker.named_by_user(cases))
    _require_shared_cases(cases, earlier.siblings)
    plan = Plan(settings, cases, draws, reference.warnings())
    write_atomically(staging.plan, msgspec.json.encode(plan))
    return plan


def changes_inputs(replaced: Golden, settings: Settings) -> bool:
    """Tell whether a recording has other inputs than the set that it replaces."""
    cases = replaced.manifest.cases
    prompts = {case_recipe(case).recipe.prompt for case in cases if case.origin == _PROMPT}
    names = {case.name for case in cases}
    return (
        not _keeps_cases(replaced, settings)
        or replaced.manifest.storage is not settings.storage
        or not prompts.issuperset(settings.prompts)
        or not names.issuperset(f"{_LONG}-{length}" for length in settings.long)
    )


def _keeps_cases(template: Golden, settings: Settings) -> bool:
    """Tell whether a recording takes over the cases of an earlier one."""
    manifest = template.manifest
    return (manifest.seed, manifest.draws.variants) == (settings.seed, settings.variants)


def _require_shared_cases(cases: Sequence[PlannedCase], siblings: Sequence[Golden]) -> None:
    """Raise GoldenExists, before the model runs, if sets that share the inputs have other cases."""
    for sibling in siblings:
        if [case.name for case in cases] != [case.name for case in sibling.manifest.cases]:
            raise GoldenExists(
                f"{sibling.manifest.title} shares the inputs of this revision, and these would "
                "change them",
                "record the same cases in the same storage, or remove it first",
            )


@dataclass(frozen=True, slots=True)
class _CaseMaker:
    """Makes cases, and stages what the reference's processor makes of them."""

    staging: Staging
    settings: Settings
    reference: Reference
    progress: Progress
    _refusals: dict[str, int] = field(default_factory=dict)
    _left_out: dict[str, str] = field(default_factory=dict)

    # Cases of an earlier recording

    def take_over(self, template: Golden, *, replaced: Golden | None) -> tuple[PlannedCase, ...]:
        """Stage the inputs of an earlier recording, and report what would differ now."""
        cases = template.manifest.cases
        with self.progress.stage("preparing cases", len(cases)) as steps:
            return tuple(self._take_over(template, case, replaced, steps) for case in cases)

    def _take_over(
        self, template: Golden, case: CaseEntry, replaced: Golden | None, steps: Iterator[int]
    ) -> PlannedCase:
        stored = template.stored_inputs(case.name)
        whole = _unpacked(stored, template, case)
        now = self._prepared_now(case_recipe(case))
        self._report_differences(case, whole, now)
        if template.manifest.storage is not self.settings.storage:
            stored = self._packed(whole)
        self.staging.save_part(case.name, INPUTS, stored)
        if case.images:
            self._save_grids(template, case, now[0] if now else None)
        next(steps)
        planned = PlannedCase(
            case.name, case.origin, case.recipe, case.text, case.tiles, case.eos_token_ids
        )
        if case.origin == _END and replaced is None and Phase.GENERATE in self.settings.phases:
            # The tokens that another device or dtype generates may be others.
            ends = self._own_ends(parts.as_inputs(whole))
            return msgspec.structs.replace(planned, eos_token_ids=ends)
        return planned

    def _prepared_now(self, named: NamedRecipe) -> tuple[PreparedCase, list[Image.Image]] | None:
        """Return what the processor makes of a recorded case now; None if it refuses it."""
        try:
            images = [render(image) for image in named.recipe.images]
            return self.reference.prepare(named.recipe, images), images
        except InputRefused as refusal:
            self.progress.note(
                f"case {named.name}: the processor refuses it now ({refusal}); the recorded inputs "
                "are kept"
            )
            return None

    def _report_differences(
        self,
        case: CaseEntry,
        recorded: parts.Tensors,
        now: tuple[PreparedCase, list[Image.Image]] | None,
    ) -> None:
        if now is None:
            return
        prepared, images = now
        made = parts.input_tensors(prepared, images)
        differing = [] if prepared.text == case.text else ["text"]
        names = dict.fromkeys([*recorded, *made])
        differing += [n for n in names if not _same(recorded.get(n), made.get(n))]
        if differing:
            self.progress.note(
                f"case {case.name}: {', '.join(differing)} would be different now; the recorded "
                "inputs are kept"
            )

    def _save_grids(self, template: Golden, case: CaseEntry, now: PreparedCase | None) -> None:
        file = phase_file(Phase.PREPROCESSING)
        if _GRIDS in template.tensor_names(case.name, Phase.PREPROCESSING):
            grids = template.tensor(case.name, Phase.PREPROCESSING, _GRIDS)
        elif now is not None:
            grids = now.image_grids
        else:
            return
        self.staging.save_part(case.name, file, {_GRIDS: grids})

    # Cases that are drawn

    def draw(self) -> tuple[tuple[PlannedCase, ...], Draws]:
        """Prepare the fixed cases, draw the variants, and find a case that meets an end token.

        A case that the reference refuses is left out if others remain.
        """
        kind, variants = self._kind(), self.settings.variants
        fixed = fixed_cases(kind)
        with self.progress.stage("drawing cases", len(fixed) + variants) as steps:
            found = [self._fixed_case(named, steps) for named in fixed]
            found += [self._draw_case(index, kind, steps) for index in range(variants)]
        cases = [case for case in found if case is not None]
        self._require_some(cases, kind)
        if Phase.GENERATE in self.settings.phases:
            cases += self._end_case()
        draws = Draws(
            variants=variants,
            refused=sum(self._refusals.values()),
            reasons=self._refusals,
            left_out=self._left_out,
        )
        return tuple(cases), draws

    def _kind(self) -> InputKind:
        return InputKind.of(self.reference.info().phases)

    def _fixed_case(self, named: NamedRecipe, steps: Iterator[int]) -> PlannedCase | None:
        try:
            return self._prepare(named)
        except InputRefused as refusal:
            self._leave_out(named.name, str(refusal))
            return None
        finally:
            next(steps)

    def _draw_case(self, index: int, kind: InputKind, steps: Iterator[int]) -> PlannedCase | None:
        """Draw a variant until the reference takes it, counting what it refused."""
        from snapshot_tool.record.variants import draw_recipe

        name = f"variant-{index + 1:02}"
        next(steps)
        reason, has_template = "", True
        for attempt in range(_MAX_ATTEMPTS):
            recipe = draw_recipe(seed=self.settings.seed, index=index, attempt=attempt, kind=kind)
            if not has_template:
                recipe = replace(recipe, chat=False)
            try:
                return self._prepare(NamedRecipe(name, "variant", recipe))
            except InputRefused as refusal:
                has_template &= not isinstance(refusal, TemplateRefused)
                reason = printable(str(refusal))
                self._refusals[reason] = self._refusals.get(reason, 0) + 1
        self._leave_out(name, f"{_MAX_ATTEMPTS} draws, the last: {reason}")
        return None

    def _leave_out(self, name: str, reason: str) -> None:
        self._left_out[name] = printable(reason)

    def _require_some(self, cases: Sequence[PlannedCase], kind: InputKind) -> None:
        """Raise ReferenceUnavailable unless there are cases, with images if the model takes any."""
        lacks_images = kind is InputKind.BOTH and not any(case.tiles for case in cases)
        if cases and not lacks_images:
            for name, reason in self._left_out.items():
                self.progress.note(f"case {name} is left out: the reference refuses it: {reason}")
            return
        name, reason = next(iter(self._left_out.items()))
        which = "every case with an image" if cases else "every case"
        raise ReferenceUnavailable(
            f"the reference refuses {which}; case {name}: {reason}",
            "see that the processor's files, config.json and the weights fit each other",
        )

    def _end_case(self) -> list[PlannedCase]:
        """Return a case whose generation meets an end token; none if that cannot be seen.

        It is the first prompt that ends by itself. If none does, a token that the model does
        generate ends the case.
        """
        tokens = self.settings.max_new_tokens
        last: tuple[CaseRecipe, tuple[int, ...]] | None = None
        for recipe in END_PROMPTS if tokens > 1 else ():
            try:
                prepared = self.reference.prepare(recipe, [], new_tokens=tokens)
            except InputRefused:
                continue
            ends = self._own_ends(prepared.inputs)
            if ends is None:
                return [self._prepare(NamedRecipe(_END, _END, recipe))]
            last = last or (recipe, ends)
        if last is None:
            return []
        planned = self._prepare(NamedRecipe(_END, _END, last[0]))
        return [msgspec.structs.replace(planned, eos_token_ids=last[1])]

    def _own_ends(self, inputs: CaseInputs) -> tuple[int, ...] | None:
        """Return the end tokens of a case of its own; None if it ends by the checkpoint's."""
        tokens = self.settings.max_new_tokens
        new = self.reference.generate(inputs, max_new_tokens=tokens).token_ids.tolist()
        ends = self.reference.info().eos_token_ids
        if new[-1] in ends and len(new) < tokens:
            return None
        # The second token or a later one: a port that ends at once must be seen, too.
        fresh = [t for place, t in enumerate(new[:-1]) if place and t not in new[:place]]
        token = fresh[0] if fresh else new[0]
        return (*ends, token) if len(ends) > 1 else (token,)

    # Cases that the user names

    def named_by_user(self, cases: Sequence[PlannedCase]) -> Iterator[PlannedCase]:
        """Yield the cases of --prompt and --long that are not among `cases`."""
        prompts = {case.named.recipe.prompt for case in cases if case.origin == _PROMPT}
        number = sum(case.origin == _PROMPT for case in cases)
        kind = self._kind()
        if kind is InputKind.IMAGES and (self.settings.prompts or self.settings.long):
            raise UsageError("this model takes no text", "leave out --prompt and --long")
        for prompt in self.settings.prompts:
            if prompt not in prompts:
                number += 1
                yield self._user_case(f"{_PROMPT}-{number:02}", _PROMPT, _with_images(prompt, kind))
        names = {case.name for case in cases}
        for length in self.settings.long:
            if f"{_LONG}-{length}" not in names:
                yield self._long_case(length)

    def _user_case(self, name: str, origin: str, recipe: CaseRecipe) -> PlannedCase:
        try:
            return self._prepare(NamedRecipe(name, origin, recipe))
        except InputRefused as refusal:
            raise UsageError(
                f"the reference refuses case {name}: {refusal}",
                "leave it out of --prompt or --long, or shorten it",
            ) from refusal

    def _long_case(self, length: int) -> PlannedCase:
        """Return a case with a prompt of at least so many tokens, and hardly more."""
        count = max(1, length // 8)
        while True:
            words = random.Random(self.settings.seed).choices(_WORDS, k=count)  # noqa: S311
            case = self._user_case(f"{_LONG}-{length}", _LONG, CaseRecipe(" ".join(words)))
            tokens = self._staged_inputs(case.name).input_ids.shape[1]
            if tokens >= length:
                return case
            count += max(1, (length - tokens) * count // tokens)

    def _staged_inputs(self, case: str) -> CaseInputs:
        return parts.read_inputs(self.staging.part(case, INPUTS))

    # All cases

    def _prepare(self, named: NamedRecipe) -> PlannedCase:
        """Stage what the processor makes of a recipe; raise InputRefused if it takes none."""
        images = [render(image) for image in named.recipe.images]
        prepared = self.reference.prepare(
            named.recipe, images, new_tokens=self.settings.max_new_tokens
        )
        tensors = self._packed(parts.input_tensors(prepared, images))
        self.staging.save_part(named.name, INPUTS, tensors)
        if images:
            grids = {_GRIDS: prepared.image_grids}
            self.staging.save_part(named.name, phase_file(Phase.PREPROCESSING), grids)
        pixels = prepared.inputs.pixel_values
        tiles = 0 if pixels is None else len(pixels)
        recipe = to_builtins(named.recipe)
        return PlannedCase(named.name, named.origin, recipe, prepared.text, tiles)

    def _packed(self, tensors: parts.Tensors) -> parts.Tensors:
        return tensors if self.settings.storage is Storage.FULL else pack_inputs(tensors)


_WORDS = (
    "a", "the", "red", "small", "bird", "river", "house", "sees", "crosses", "under", "and", "then",
    "seven", "green", "large", "stone", "road", "answers", "briefly", "before",
)  # fmt: skip


def _with_images(prompt: str, kind: InputKind) -> CaseRecipe:
    """Return the recipe of a user's prompt, with the fixed cases' images for its placeholders."""
    count = prompt.count(IMAGE_TOKEN) if kind is InputKind.BOTH else 0
    pictures: list[ImageRecipe] = list(FIXED_CASES[1].recipe.images)
    try:
        return CaseRecipe(prompt, tuple(pictures[place % 2] for place in range(count)))
    except ValueError as error:
        raise UsageError(
            f"--prompt {prompt[:40]!r}: {error}", "this model takes no images"
        ) from error


def _unpacked(stored: parts.Tensors, template: Golden, case: CaseEntry) -> parts.Tensors:
    try:
        return unpack_inputs(stored)
    except ValueError as error:
        raise GoldenDamaged(f"{template.folder}: inputs of case {case.name}: {error}") from error


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    import torch

    if one is None or other is None:
        return one is other
    return one.dtype == other.dtype and torch.equal(one, other)
