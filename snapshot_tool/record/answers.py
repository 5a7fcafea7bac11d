"""Asking the reference: one forward pass and one generation a case, staged as soon as answered."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from snapshot_tool.base.errors import ReferenceUnavailable, ReferenceWrong
from snapshot_tool.base.phases import Phase
from snapshot_tool.base.protocol import CaseInputs, Progress, Reference
from snapshot_tool.base.tap import Side, TapRecorder
from snapshot_tool.goldens import parts
from snapshot_tool.goldens.compact import (
    compact_tensors,
    is_large,
    make_question,
    narrowed,
    question_tensors,
)
from snapshot_tool.goldens.layout import INPUTS, OUTPUTS, TAPS, phase_file
from snapshot_tool.goldens.manifest import Storage
from snapshot_tool.record.plan import Plan, PlannedCase, Staging

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Shortener:
    """Shortens the answers of one case; what the connector is asked is kept with its answer."""

    seed: int
    _question: dict[str, torch.Tensor] = field(default_factory=dict)

    def ask_connector(self, features: torch.Tensor) -> torch.Tensor:
        """Return what the connector is asked about, given the encoder's own output."""
        if not is_large(features):
            return features
        self._question.update(question_tensors(features, seed=self.seed))
        return make_question(self._question, seed=self.seed)

    def shorten(self, phase: Phase, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the compact form of what is large, and the rest as it is."""
        kept = dict(self._question) if phase is Phase.CONNECTOR else {}
        for name, tensor in tensors.items():
            if is_large(tensor):
                kept |= compact_tensors(name, tensor, seed=self.seed)
            else:
                kept[name] = narrowed(tensor)
        return kept


# One run of the model from end to end answers these.
FORWARD_PASS = frozenset({Phase.VISION, Phase.CONNECTOR, Phase.FORWARD})
_NOTES = "{}.notes.json"


class Notes(msgspec.Struct, frozen=True):
    """What is kept of a case besides tensors and text.

    `warnings` are those up to the case's answers, `not_finite` the answers with NaN or Inf.
    """

    warnings: tuple[str, ...] = ()
    not_finite: tuple[str, ...] = ()


def generated_text_file() -> str:
    """Return the name of the part that holds a case's generated text."""
    return f"{Phase.GENERATE.value}.txt"


def read_notes(staging: Staging, case: str) -> Notes:
    """Return the notes of all parts of a case."""
    paths = [staging.part(case, _NOTES.format(part)) for part in (TAPS, Phase.GENERATE.value)]
    found = [msgspec.json.decode(p.read_bytes(), type=Notes) for p in paths if p.exists()]
    return Notes(
        tuple(sorted({warning for notes in found for warning in notes.warnings})),
        tuple(name for notes in found for name in notes.not_finite),
    )


def stage_answers(
    staging: Staging, plan: Plan, *, reference: Reference, progress: Progress, allows_nan: bool
) -> None:
    """Ask for everything that is planned and not staged yet.

    Raises ReferenceWrong, naming the case, for an answer that has NaN or Inf in it unless they are
    allowed.
    """
    asker = _Asker(staging, plan, reference, progress, allows_nan)
    with progress.stage("recording cases", len(plan.cases)) as steps:
        for case in plan.cases:
            inputs = parts.read_inputs(staging.part(case.name, INPUTS))
            with _named(case):
                asker.stage_forward(case.name, inputs)
                asker.stage_generation(case, inputs)
            next(steps)


@contextmanager
def _named(case: PlannedCase) -> Iterator[None]:
    """Name the case of which the reference makes nothing."""
    try:
        yield
    except ReferenceUnavailable as error:
        raise ReferenceUnavailable(f"case {case.name}: {error.problem}", error.remedy) from error


@dataclass(frozen=True, slots=True)
class _Asker:
    staging: Staging
    plan: Plan
    reference: Reference
    progress: Progress
    allows_nan: bool

    def stage_forward(self, case: str, inputs: CaseInputs) -> None:
        """Run the model once and stage vision, connector, forward and taps."""
        settings = self.plan.settings
        wanted = FORWARD_PASS & set(settings.phases)
        # taps.safetensors is written last of a forward pass: its presence says the pass is staged.
        if not wanted or self.staging.part(case, TAPS).exists():
            return
        recorder = TapRecorder(settings.seed, inputs.attention_mask)
        whole: dict[str, torch.Tensor] = {}

        def observe(module: str, side: Side, tensor: torch.Tensor) -> None:
            recorder(module, side, tensor)
            if keep_whole and side is Side.OUTPUT and tensor.is_floating_point():
                # A copy: a later module may write into it.
                whole.setdefault(module, tensor.to("cpu", copy=True))

        keep_whole = any(fnmatch.fnmatchcase(case, glob) for glob in settings.whole_outputs)
        short = Shortener(settings.seed) if settings.storage is Storage.COMPACT else None
        ask_connector = short.ask_connector if short else None
        answer = self.reference.forward(inputs, observe=observe, ask_connector=ask_connector)
        not_finite: list[str] = []
        for phase in sorted(wanted):
            outputs = answer.outputs.get(phase, {})
            tensors = {name: parts.without_padding(t, inputs) for name, t in outputs.items()}
            judged = dict(tensors)
            tensors = short.shorten(phase, tensors) if short else tensors
            if phase is Phase.FORWARD and answer.logits is not None:
                judged[parts.LOGITS] = parts.real_rows(answer.logits, inputs)
                tensors |= parts.forward_tensors(answer.logits, inputs, seed=settings.seed)
            not_finite += self._not_finite(case, phase, judged)
            if tensors:
                self.staging.save_part(case, phase_file(phase), tensors)
        if whole:
            self.staging.save_part(case, OUTPUTS, whole)
        taps = parts.tap_tensors(recorder.taps(), self.reference.info().modules)
        self._note(case, TAPS, not_finite)
        self.staging.save_part(case, TAPS, taps)

    def stage_generation(self, case: PlannedCase, inputs: CaseInputs) -> None:
        """Generate and stage the tokens, with their text."""
        settings = self.plan.settings
        file = phase_file(Phase.GENERATE)
        if Phase.GENERATE not in settings.phases or self.staging.part(case.name, file).exists():
            return
        generation = self.reference.generate(
            inputs, max_new_tokens=settings.max_new_tokens, eos_token_ids=case.eos_token_ids
        )
        not_finite = self._not_finite(case.name, Phase.GENERATE, {parts.LOGITS: generation.logits})
        self._note(case.name, Phase.GENERATE.value, not_finite)
        text = generation.text.encode("utf-8", "replace")
        self.staging.save_bytes(case.name, generated_text_file(), text)
        self.staging.save_part(case.name, file, parts.generate_tensors(generation))

    def _not_finite(
        self, case: str, phase: Phase, tensors: Mapping[str, torch.Tensor]
    ) -> list[str]:
        """Return the tensors with NaN or Inf in them; raise ReferenceWrong unless allowed."""
        found = []
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                what = "NaN" if bool(tensor.isnan().any()) else "Inf"
                problem = f"the reference answers {what} in case {case}: {phase} {name}"
                if not self.allows_nan:
                    raise ReferenceWrong(
                        problem,
                        "record in another --dtype, or keep such answers: --resume --allow-nan",
                    )
                self.progress.note(problem)
                found.append(f"{phase}/{name}")
        return found

    def _note(self, case: str, part: str, not_finite: list[str]) -> None:
        notes = Notes(self.reference.warnings(), tuple(not_finite))
        self.staging.save_bytes(case, _NOTES.format(part), msgspec.json.encode(notes))
