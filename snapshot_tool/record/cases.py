"""Make the cases of a recording: draw them, or take over those of an earlier recording.

Inputs of an earlier recording are taken over unchanged: the text, the ids and the pixels. A date in
a chat template, another tokenizer or another Pillow would change them; that is only reported.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import msgspec
import torch

from snapshot_tool.base.errors import (
    InputRefused,
    ReferenceUnavailable,
    TemplateRefused,
    UsageError,
    printable,
)
from snapshot_tool.base.files import write_atomically
from snapshot_tool.base.protocol import CaseInputs, Generation, Phase, Progress
from snapshot_tool.base.recipes import (
    END_PROMPTS,
    FIXED_CASES,
    IMAGE_TOKEN,
    CaseRecipe,
    InputKind,
    NamedRecipe,
    fixed_cases,
)
from snapshot_tool.goldens import parts
from snapshot_tool.goldens.golden import Golden
from snapshot_tool.goldens.images import pack_inputs, render, unpack_inputs
from snapshot_tool.goldens.layout import INPUTS, phase_file
from snapshot_tool.goldens.manifest import CaseEntry, Draws, Storage, case_recipe
from snapshot_tool.record.answers import save_generation
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
    from snapshot_tool.reference.huggingface import HuggingFaceReference

_MAX_ATTEMPTS = 50
_END, _PROMPT, _LONG = "end-token", "prompt", "long"
_GRIDS = "image_grids"


def make_plan(
    staging: Staging,
    settings: Settings,
    *,
    reference: HuggingFaceReference,
    earlier: Earlier,
    redraw: bool,
    progress: Progress,
) -> Plan:
    """Return the staged plan, or draw or take over the cases and stage their inputs.

    redraw: draw the cases even if an earlier recording has them.
    """
    if staging.plan.exists():
        plan = read_plan(staging)
        require_same_settings(plan.settings, settings)
        return plan
    shutil.rmtree(staging.parts, ignore_errors=True)
    maker = _CaseMaker(staging, settings, reference, progress)
    template = earlier.template
    if template and not redraw and _keeps_cases(template, settings):
        cases = maker.take_over(template, replaced=earlier.replaced)
        draws = template.manifest.draws
    else:
        cases, draws = maker.draw()
    cases = [*cases, *maker.named_by_user(cases)]
    names = [case.name for case in cases]
    # Before the model runs; the tensors are compared when the set is complete.
    earlier.require_shared_inputs(lambda sibling: [case.name for case in sibling.cases] == names)
    plan = Plan(settings, tuple(cases), draws, reference.warnings())
    write_atomically(staging.plan, msgspec.json.encode(plan))
    return plan


def changes_inputs(replaced: Golden, settings: Settings) -> bool:
    """Return whether a recording has other inputs than the set that it replaces."""
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
    """Return whether a recording takes over the cases of an earlier one."""
    manifest = template.manifest
    return (manifest.seed, manifest.draws.variants) == (settings.seed, settings.variants)


@dataclass(frozen=True, slots=True)
class _CaseMaker:
    """Makes cases, and stages their inputs as the reference's processor returns them."""

    staging: Staging
    settings: Settings
    reference: HuggingFaceReference
    progress: Progress
    _refusals: dict[str, int] = field(default_factory=dict)
    _left_out: dict[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> InputKind:
        """What the inputs of the model consist of."""
        return InputKind.of(self.reference.info().phases)

    # Cases of an earlier recording

    def take_over(self, template: Golden, *, replaced: Golden | None) -> list[PlannedCase]:
        """Stage the inputs of an earlier recording, and report what would differ now."""
        found = []
        with self.progress.stage("preparing cases", len(template.manifest.cases)) as steps:
            for case in template.manifest.cases:
                planned = PlannedCase(
                    case.name, case.origin, case.recipe, case.text, case.tiles, case.eos_token_ids
                )
                recorded = self._take_over_inputs(template, case)
                ends_anew = replaced is None and Phase.GENERATE in self.settings.phases
                if case.origin == _END and ends_anew:
                    # Another device or dtype may generate other tokens.
                    generation, ends = self._generate_to_end(parts.as_inputs(recorded))
                    self._stage_generation(case.name, generation)
                    planned = msgspec.structs.replace(planned, eos_token_ids=ends)
                found.append(planned)
                next(steps)
        return found

    def _take_over_inputs(self, template: Golden, case: CaseEntry) -> parts.Tensors:
        """Stage a case's recorded inputs and grids; return the inputs, unpacked."""
        stored = template.read_case(INPUTS, case.name)
        with template.decoding(INPUTS, f"inputs of {case.name}"):
            recorded = unpack_inputs(stored)
        recipe = case_recipe(case).recipe
        images = [render(image) for image in recipe.images]
        try:
            now = self.reference.prepare(recipe, images)
        except InputRefused as refusal:
            now = None
            self.progress.note(
                f"case {case.name}: the processor refuses it now ({refusal}); the recorded inputs "
                "are kept"
            )
        if now is not None:
            made = parts.input_tensors(now, images)
            differing = [] if now.text == case.text else ["text"]
            names = dict.fromkeys([*recorded, *made])
            differing += [n for n in names if not _same(recorded.get(n), made.get(n))]
            if differing:
                self.progress.note(
                    f"case {case.name}: {', '.join(differing)} would be different now; the "
                    "recorded inputs are kept"
                )
        if template.manifest.storage is not self.settings.storage:
            stored = self._packed(recorded)
        self.staging.save_part(case.name, INPUTS, stored)
        grids = now.image_grids if case.images and now is not None else None
        if _GRIDS in template.tensor_names(case.name, Phase.PREPROCESSING):
            grids = template.tensor(case.name, Phase.PREPROCESSING, _GRIDS)
        if grids is not None:
            self.staging.save_part(case.name, phase_file(Phase.PREPROCESSING), {_GRIDS: grids})
        return recorded

    # Cases that are drawn

    def draw(self) -> tuple[list[PlannedCase], Draws]:
        """Prepare the fixed cases, draw the variants, and find a case that meets an end token.

        A case that the reference refuses is left out if others remain.
        """
        kind, variants = self.kind, self.settings.variants
        fixed = fixed_cases(kind)
        cases: list[PlannedCase] = []
        with self.progress.stage("drawing cases", len(fixed) + variants) as steps:
            for named in fixed:
                try:
                    cases.append(self._prepare(named))
                except InputRefused as refusal:
                    self._left_out[named.name] = printable(str(refusal))
                next(steps)
            for index in range(variants):
                cases += self._draw_case(index, kind)
                next(steps)
        self._require_some(cases, kind)
        if Phase.GENERATE in self.settings.phases:
            cases += self._end_case()
        draws = Draws(
            variants=variants,
            refused=sum(self._refusals.values()),
            reasons=self._refusals,
            left_out=self._left_out,
        )
        return cases, draws

    def _draw_case(self, index: int, kind: InputKind) -> list[PlannedCase]:
        """Draw a variant until the reference accepts it; return none if it refuses every draw."""
        from snapshot_tool.record.variants import draw_recipe

        name = f"variant-{index + 1:02}"
        reason, has_template = "", True
        for attempt in range(_MAX_ATTEMPTS):
            recipe = draw_recipe(seed=self.settings.seed, index=index, attempt=attempt, kind=kind)
            if not has_template:
                recipe = replace(recipe, chat=False)
            try:
                return [self._prepare(NamedRecipe(name, "variant", recipe))]
            except InputRefused as refusal:
                has_template &= not isinstance(refusal, TemplateRefused)
                reason = printable(str(refusal))
                self._refusals[reason] = self._refusals.get(reason, 0) + 1
        self._left_out[name] = f"{_MAX_ATTEMPTS} draws, the last: {reason}"
        return []

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
            "check that the processor's files, config.json and the weights fit each other",
        )

    def _end_case(self) -> list[PlannedCase]:
        """Return a case whose generation meets an end token, or none if no prompt is accepted.

        It is the first prompt that ends by itself. If none does, it is the first prompt, ended by
        one of the tokens that the model generates.
        """
        tokens = self.settings.max_new_tokens
        found: tuple[CaseRecipe, Generation, tuple[int, ...] | None] | None = None
        for recipe in END_PROMPTS if tokens > 1 else ():
            try:
                prepared = self.reference.prepare(recipe, [], new_tokens=tokens)
            except InputRefused:
                continue
            generation, ends = self._generate_to_end(prepared.inputs)
            if found is None or ends is None:
                found = recipe, generation, ends
            if ends is None:
                break
        if found is None:
            return []
        recipe, generation, ends = found
        planned = self._prepare(NamedRecipe(_END, _END, recipe))
        self._stage_generation(_END, generation)
        return [msgspec.structs.replace(planned, eos_token_ids=ends)]

    def _generate_to_end(self, inputs: CaseInputs) -> tuple[Generation, tuple[int, ...] | None]:
        """Return a generation up to an end token, and the case's own end tokens.

        These are None if the generation ends by the checkpoint's end tokens.
        """
        tokens = self.settings.max_new_tokens
        whole = self.reference.generate(inputs, max_new_tokens=tokens)
        new = whole.token_ids.tolist()
        ends = self.reference.info().eos_token_ids
        if new[-1] in ends and len(new) < tokens:
            return whole, None
        # Not the first token if possible: a port that ends at once must fail, too.
        fresh = [place for place, t in enumerate(new[:-1]) if place and t not in new[:place]]
        length = (fresh[0] if fresh else 0) + 1
        token = new[length - 1]
        cut = Generation(whole.token_ids[:length], whole.logits[:length])
        return cut, (*ends, token) if len(ends) > 1 else (token,)

    def _stage_generation(self, case: str, generation: Generation) -> None:
        """Stage a generation, so that it is not computed again.

        One with NaN or Inf is left to recording, which reports these.
        """
        if bool(generation.logits.isfinite().all()):
            save_generation(self.staging, case, generation, reference=self.reference)

    # Cases that the user names

    def named_by_user(self, cases: Sequence[PlannedCase]) -> Iterator[PlannedCase]:
        """Yield the cases of --prompt and --long that are not among `cases`."""
        prompts = {case.named.recipe.prompt for case in cases if case.origin == _PROMPT}
        number = sum(case.origin == _PROMPT for case in cases)
        kind = self.kind
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
        """Return a case whose prompt has at least `length` tokens, and few more."""
        count = max(1, length // 8)
        while True:
            words = random.Random(self.settings.seed).choices(_WORDS, k=count)  # noqa: S311
            case = self._user_case(f"{_LONG}-{length}", _LONG, CaseRecipe(" ".join(words)))
            staged = parts.read_inputs(self.staging.part(case.name, INPUTS))
            tokens = staged.input_ids.shape[1]
            if tokens >= length:
                return case
            count += max(1, (length - tokens) * count // tokens)

    # All cases

    def _prepare(self, named: NamedRecipe) -> PlannedCase:
        """Stage the inputs of a recipe; raise InputRefused if the processor refuses it."""
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
        recipe = msgspec.to_builtins(named.recipe)
        return PlannedCase(named.name, named.origin, recipe, prepared.text, tiles)

    def _packed(self, tensors: parts.Tensors) -> parts.Tensors:
        return tensors if self.settings.storage is Storage.FULL else pack_inputs(tensors)


_WORDS = (
    "a", "the", "red", "small", "bird", "river", "house", "sees", "crosses", "under", "and", "then",
    "seven", "green", "large", "stone", "road", "answers", "briefly", "before",
)  # fmt: skip


def _with_images(prompt: str, kind: InputKind) -> CaseRecipe:
    """Return a user's prompt with the images of the fixed cases for its placeholders."""
    count = prompt.count(IMAGE_TOKEN) if kind is InputKind.BOTH else 0
    pictures = FIXED_CASES[1].recipe.images
    try:
        return CaseRecipe(prompt, tuple(pictures[place % 2] for place in range(count)))
    except ValueError as error:
        raise UsageError(
            f"--prompt {prompt[:40]!r}: {error}", "this model takes no images"
        ) from error


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return False
    return one.dtype == other.dtype and torch.equal(one, other)
