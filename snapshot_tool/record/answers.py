"""Run the reference on each case, and stage its outputs as soon as they are computed."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import torch
from safetensors.torch import load_file

from snapshot_tool.base.errors import ReferenceUnavailable, ReferenceWrong
from snapshot_tool.base.protocol import CaseInputs, Generation, Phase, Progress, Side
from snapshot_tool.base.tolerance import ORACLE_DTYPES
from snapshot_tool.diagnose.modules import can_isolate
from snapshot_tool.goldens import parts
from snapshot_tool.goldens.golden import Golden
from snapshot_tool.goldens.layout import INPUTS, MODULE_INPUTS, OUTPUTS, PROBES, TAPS, phase_file
from snapshot_tool.goldens.manifest import Storage
from snapshot_tool.numerics.compact import compacted, is_large, make_question, question_tensors
from snapshot_tool.record.plan import Plan, PlannedCase, Recording, Settings, Staging
from snapshot_tool.taps.sketches import (
    Probe,
    TapRecorder,
    probe_input,
    probe_shapes,
    relative_error,
    sketch,
)

if TYPE_CHECKING:
    from snapshot_tool.reference.huggingface import HuggingFaceReference

# Phases that one forward pass of the whole model records.
FORWARD_PASS = frozenset({Phase.VISION, Phase.CONNECTOR, Phase.FORWARD})
# Staged parts that are not files of a golden set.
GENERATED_TEXT = "generate.txt"
_NOTES = "{}.notes.json"


class Notes(msgspec.Struct, frozen=True):
    """What is staged of a case besides tensors and text.

    `warnings` are those up to the case's outputs, `not_finite` the outputs with NaN or Inf.
    """

    warnings: tuple[str, ...] = ()
    not_finite: tuple[str, ...] = ()


def read_notes(staging: Staging, case: str) -> Notes:
    """Return the notes of all parts of a case."""
    paths = [staging.part(case, _NOTES.format(part)) for part in (TAPS, Phase.GENERATE.value)]
    found = [msgspec.json.decode(p.read_bytes(), type=Notes) for p in paths if p.exists()]
    return Notes(
        tuple(sorted({warning for notes in found for warning in notes.warnings})),
        tuple(name for notes in found for name in notes.not_finite),
    )


def save_generation(
    staging: Staging,
    case: str,
    generation: Generation,
    *,
    reference: HuggingFaceReference,
    not_finite: Sequence[str] = (),
) -> None:
    """Stage generated tokens and their text."""
    notes = Notes(reference.warnings(), tuple(not_finite))
    _save_notes(staging, case, Phase.GENERATE.value, notes)
    text = reference.decode(generation.token_ids)
    staging.save_bytes(case, GENERATED_TEXT, text.encode("utf-8", "replace"))
    # Written last: its presence means that the generation is complete.
    staging.save_part(case, phase_file(Phase.GENERATE), parts.generate_tensors(generation))


def stage_answers(
    recording: Recording, plan: Plan, reference: HuggingFaceReference, progress: Progress
) -> None:
    """Compute and stage every output that is planned and not staged yet.

    Raises ReferenceWrong, naming the case, for an output with NaN or Inf unless these are allowed.
    """
    recorder = _Recorder(recording, plan.settings, reference, progress)
    with progress.stage("recording cases", len(plan.cases)) as steps:
        for case in plan.cases:
            inputs = parts.read_inputs(recording.staging.part(case.name, INPUTS))
            try:
                recorder.stage_forward(case.name, inputs)
                recorder.stage_generation(case, inputs)
            except ReferenceUnavailable as error:
                problem = f"case {case.name}: {error.problem}"
                raise ReferenceUnavailable(problem, error.remedy) from error
            next(steps)


def keep_answers(
    staging: Staging, plan: Plan, replaced: Golden, accepted: Sequence[str]
) -> list[str]:
    """Stage the replaced set's answers of all cases that are not accepted, and return their names.

    They take the place of what is staged. accepted: globs of the cases whose new answers are
    recorded.
    """
    kept = []
    for name in (case.name for case in plan.cases):
        old = replaced.cases.get(name)
        if old is None or _matches(name, accepted):
            continue
        kept.append(name)
        for part, files in ((TAPS, FORWARD_PASS), (Phase.GENERATE.value, {Phase.GENERATE})):
            found = [n for n in old.not_finite if Phase(n.partition("/")[0]) in files]
            _save_notes(staging, name, part, Notes((), tuple(found)))
        staging.save_bytes(name, GENERATED_TEXT, old.generated.encode("utf-8", "replace"))
        for file in replaced.manifest.files.keys() - {INPUTS}:
            if tensors := replaced.read_case(file, name):
                staging.save_part(name, file, tensors)
    return kept


def stage_probes(recording: Recording, plan: Plan, reference: HuggingFaceReference) -> None:
    """Run single modules of those that ran in the first case, and stage their outputs.

    A reference that accelerate placed has none: not all of it is in memory.
    """
    case, staging = plan.cases[0].name, recording.staging
    if not staging.part(case, TAPS).exists() or staging.part(case, PROBES).exists():
        return
    if recording.load.device_map:
        return
    modules = reference.info().modules
    taps = parts.read_taps(load_file(staging.part(case, TAPS)), modules)
    found = [probe for tap in taps for probe in _probe(tap.module, recording, plan, reference)]
    if found:
        staging.save_part(case, PROBES, parts.probe_tensors(found, modules))


def _probe(
    module: str, recording: Recording, plan: Plan, reference: HuggingFaceReference
) -> Iterator[Probe]:
    """Yield the probes of a module, with its outputs and their errors in every dtype."""
    own = reference.modules().get_submodule(module)
    inputs = [] if next(own.children(), None) else list(probe_shapes(own))
    if not inputs:
        return
    seed = plan.settings.seed
    given = [probe_input(shape, size, seed=seed) for shape, size in inputs]
    try:
        answers = {
            dtype: [sketch(a, seed=seed) for a in reference.run_module(module, given, dtype=dtype)]
            for dtype in dict.fromkeys(("float64", recording.dtype, *ORACLE_DTYPES))
        }
    except (TypeError, RuntimeError, ValueError):  # it takes other inputs
        return
    for row, (shape, size) in enumerate(inputs):
        exact = answers["float64"][row]
        noise = {dtype: relative_error(exact, found[row]) for dtype, found in answers.items()}
        yield Probe(module, shape, size, answers[recording.dtype][row], noise)


def _save_notes(staging: Staging, case: str, part: str, notes: Notes) -> None:
    staging.save_bytes(case, _NOTES.format(part), msgspec.json.encode(notes))


@dataclass(frozen=True, slots=True)
class _Recorder:
    """Runs the reference on one case after the other."""

    recording: Recording
    settings: Settings
    reference: HuggingFaceReference
    progress: Progress

    def stage_forward(self, case: str, inputs: CaseInputs) -> None:  # noqa: C901 - one sequence
        """Run the model once and stage vision, connector, forward and taps."""
        settings, staging = self.settings, self.recording.staging
        if not FORWARD_PASS & set(settings.phases) or staging.part(case, TAPS).exists():
            return
        keeps_inputs = _matches(case, settings.modules)
        keeps_whole = keeps_inputs or _matches(case, settings.whole_outputs)
        recorder = TapRecorder(settings.seed, inputs.attention_mask)
        whole: dict[str, torch.Tensor] = {}
        taken: dict[str, torch.Tensor] = {}
        question: dict[str, torch.Tensor] = {}

        def observe(module: str, side: Side, tensor: torch.Tensor) -> None:
            recorder(module, side, tensor)
            if keeps_whole and side is Side.OUTPUT and tensor.is_floating_point():
                # A copy: a later module may write into it.
                whole.setdefault(module, tensor.to("cpu", copy=True))
            if keeps_inputs and side is Side.INPUT and can_isolate(tensor):
                taken.setdefault(module, tensor.to("cpu", copy=True))

        def connector_input(features: torch.Tensor) -> torch.Tensor:
            if not is_large(features):
                return features
            question.update(question_tensors(features, seed=settings.seed))
            return make_question(question, seed=settings.seed)

        is_compact = settings.storage is Storage.COMPACT
        answer = self.reference.forward(
            inputs, observe=observe, connector_input=connector_input if is_compact else None
        )
        not_finite: list[str] = []
        for phase in sorted(FORWARD_PASS & set(settings.phases)):
            outputs = {
                name: parts.without_padding(tensor, inputs)
                for name, tensor in answer.outputs.get(phase, {}).items()
            }
            tensors = compacted(outputs, seed=settings.seed) if is_compact else dict(outputs)
            if phase is Phase.CONNECTOR:
                tensors = question | tensors
            if phase is Phase.FORWARD and answer.logits is not None:
                outputs[parts.LOGITS] = parts.real_rows(answer.logits, inputs)
                tensors |= parts.forward_tensors(answer.logits, inputs, seed=settings.seed)
            not_finite += self._find_not_finite(case, phase, outputs)
            if tensors:
                staging.save_part(case, phase_file(phase), tensors)
        if whole:
            staging.save_part(case, OUTPUTS, whole)
        if taken:
            staging.save_part(case, MODULE_INPUTS, taken)
        _save_notes(staging, case, TAPS, Notes(self.reference.warnings(), tuple(not_finite)))
        # Written last: its presence means that the forward pass is complete.
        modules = self.reference.info().modules
        staging.save_part(case, TAPS, parts.tap_tensors(recorder.taps(), modules))

    def stage_generation(self, case: PlannedCase, inputs: CaseInputs) -> None:
        """Generate, and stage the tokens and their text."""
        settings, staging = self.settings, self.recording.staging
        staged = staging.part(case.name, phase_file(Phase.GENERATE))
        if Phase.GENERATE not in settings.phases or staged.exists():
            return
        generation = self.reference.generate(
            inputs, max_new_tokens=settings.max_new_tokens, eos_token_ids=case.eos_token_ids
        )
        logits = {parts.LOGITS: generation.logits}
        not_finite = self._find_not_finite(case.name, Phase.GENERATE, logits)
        save_generation(
            staging, case.name, generation, reference=self.reference, not_finite=not_finite
        )

    def _find_not_finite(
        self, case: str, phase: Phase, tensors: Mapping[str, torch.Tensor]
    ) -> list[str]:
        """Return the tensors with NaN or Inf; raise ReferenceWrong unless these are allowed."""
        found = []
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                what = "NaN" if bool(tensor.isnan().any()) else "Inf"
                problem = f"the reference answers {what} in case {case}: {phase} {name}"
                if not self.recording.allows_nan:
                    raise ReferenceWrong(
                        problem,
                        "record in another --dtype, or keep such answers: --resume --allow-nan",
                    )
                self.progress.note(problem)
                found.append(f"{phase}/{name}")
        return found


def _matches(case: str, globs: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(case, glob) for glob in globs)
