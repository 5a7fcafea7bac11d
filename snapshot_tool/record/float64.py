"""The float64 reference of a recording: the reference again, in float64 and in other dtypes.

One model is in memory at a time. The float64 answers are staged whole; those of other dtypes only
as their distance to them, position by position.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

from snapshot_tool.base.errors import ReferenceUnavailable
from snapshot_tool.base.localisation import NO_NOISE
from snapshot_tool.base.phases import Phase
from snapshot_tool.base.protocol import Progress, ReferenceInfo
from snapshot_tool.base.taps import Sketch, Tap, TapRecorder, relative_error
from snapshot_tool.base.tolerance import HALF_DTYPES, ORACLE_DTYPES
from snapshot_tool.families import family_of
from snapshot_tool.families.family import Family
from snapshot_tool.goldens import parts
from snapshot_tool.goldens.layout import INPUTS, ORACLE, TAPS, phase_file
from snapshot_tool.goldens.oracle import delta_key, noise_key, step_noise_key, tap_noise_key
from snapshot_tool.numerics.float64_rule import position_noise
from snapshot_tool.record.plan import Plan, Recording, Staging

if TYPE_CHECKING:
    from snapshot_tool.reference.huggingface import HuggingFaceReference

_EXACT = "float64"
_EXACT_TAPS = "oracle.taps.safetensors"
_STEPS = "step_topk_values"

Named = dict[tuple[Phase, str], torch.Tensor]


@dataclass(frozen=True, slots=True)
class _Answers:
    """The answers of one run in one dtype, limited to what a golden set keeps of a case."""

    tensors: Named
    taps: Mapping[str, Tap]


def stage_float64(
    recording: Recording, plan: Plan, info: ReferenceInfo, progress: Progress
) -> None:
    """Stage oracle.safetensors of every case."""
    staging, own_dtype = recording.staging, recording.dtype
    family, seed = family_of(info.family), plan.settings.seed
    cases = [
        _Case(staging, case.name, family, info.modules, own_dtype, seed) for case in plan.cases
    ]
    for dtype in (_EXACT, *(d for d in ORACLE_DTYPES if d != own_dtype)):
        missing = [case for case in cases if not staging.part(case.name, _part(dtype)).exists()]
        if not missing:
            continue
        reference = recording.load_reference(dtype)
        overflows = 0
        with progress.stage(f"oracle: {dtype}", len(missing)) as steps:
            for case in missing:
                answers = case.run(reference, dtype)
                if dtype == _EXACT:
                    case.save_exact(answers)
                else:
                    staging.save_part(case.name, _part(dtype), case.noise(answers, dtype))
                overflows += not all(bool(t.isfinite().all()) for t in answers.tensors.values())
                next(steps)
        del reference  # before the next one is loaded
        if overflows:
            progress.note(
                f"in {dtype} the reference answers NaN or Inf in {overflows} of {len(missing)} "
                f"cases: they cannot be checked in {dtype}"
            )
    for case in cases:
        if not staging.part(case.name, ORACLE).exists():
            case.join()


def _part(dtype: str) -> str:
    return f"oracle.{dtype}.safetensors"


@dataclass(frozen=True, slots=True)
class _Case:
    """One case: its recorded answers, those in other dtypes, and the distances between them."""

    staging: Staging
    name: str
    family: Family
    modules: tuple[str, ...]
    dtype: str
    seed: int

    def run(self, reference: HuggingFaceReference, dtype: str) -> _Answers:
        """Run the reference on the case and on the recorded tokens after it."""
        inputs = parts.read_inputs(self.staging.part(self.name, INPUTS))
        recorder = TapRecorder(self.seed, inputs.attention_mask)
        generated = self._load(phase_file(Phase.GENERATE))
        # The connector runs on the recorded features, which are read before the model runs: in
        # float64, tensors read from a file during the run would be misread.
        vision = self.family.compared.get(Phase.VISION, "")
        features = self._load(phase_file(Phase.VISION)).get(vision)
        run = reference.forward(
            inputs,
            observe=recorder,
            continuation=generated[parts.TOKEN_IDS][:-1] if generated else None,
            connector_input=None if features is None else lambda _own: features,
        )
        self._require_same_integers(run.outputs, dtype)
        tensors: Named = {
            (phase, name): parts.without_padding(run.outputs[phase][name], inputs)
            for phase, names in self._kept().items()
            for name in names
            if name in run.outputs.get(phase, {})
        }
        if run.logits is not None:
            logits = run.logits.float() if dtype in HALF_DTYPES else run.logits
            length = inputs.input_ids.shape[1]
            real = logits[:length][parts.real_positions(inputs)]
            kept = self._load(phase_file(Phase.FORWARD))
            records = parts.position_records(
                real, topk_ids=kept["position_topk_ids"], sample_ids=kept["position_sample_ids"]
            )
            records[parts.LOGITS] = real[-1]
            tensors |= {(Phase.FORWARD, name): tensor for name, tensor in records.items()}
            if generated:
                steps = logits[length - 1 :].gather(-1, generated["step_topk_ids"])
                tensors[Phase.GENERATE, _STEPS] = steps
        return _Answers(tensors, recorder.by_module())

    def save_exact(self, answers: _Answers) -> None:
        """Stage the float64 answers whole."""
        taps = parts.tap_tensors(list(answers.taps.values()), self.modules)
        tensors = {f"{phase}.{name}": t for (phase, name), t in answers.tensors.items()}
        self.staging.save_part(self.name, _EXACT_TAPS, taps)
        self.staging.save_part(self.name, _part(_EXACT), tensors)

    def noise(self, answers: _Answers, dtype: str) -> dict[str, torch.Tensor]:
        """Return how far the answers in a dtype are from the float64 ones."""
        exact = self._exact()
        tensors = {
            noise_key(*name, dtype): position_noise(value, exact[name])
            for name, value in answers.tensors.items()
        }
        steps = Phase.GENERATE, _STEPS
        if steps in answers.tensors:
            errors = answers.tensors[steps].double() - exact[steps]
            tensors[step_noise_key(dtype)] = errors.abs().amax(-1).float()
        tensors[tap_noise_key(dtype)] = torch.tensor(self._tap_noise(answers.taps))
        return tensors

    def _tap_noise(self, taps: Mapping[str, Tap]) -> list[tuple[float, float]]:
        """Return one row for each recorded tap, in its order."""
        exact = {tap.module: tap for tap in parts.read_taps(self._load(_EXACT_TAPS), self.modules)}
        rows = []
        for tap in parts.read_taps(self._load(TAPS), self.modules):
            one, other = exact.get(tap.module), taps.get(tap.module)
            rows.append(
                (_error(one.input, other.input), _error(one.output, other.output))
                if one and other
                else (NO_NOISE, NO_NOISE)
            )
        return rows

    def join(self) -> None:
        """Stage what the golden set keeps: deltas, and the errors in every dtype."""
        stored = {phase: self._load(phase_file(phase)) for phase in self._kept()}
        recorded = {
            (phase, name): stored[phase][name]
            for phase, names in self._kept().items()
            for name in names
            if name in stored[phase]
        }
        taps = parts.read_taps(self._load(TAPS), self.modules)
        exact = self._exact()
        # Three digits of a float32 rounding error are enough; of a half-precision one they are not.
        kept = torch.bfloat16 if self.dtype == "float32" else torch.float32
        tensors = {
            delta_key(*name): (exact[name] - value.double()).to(kept)
            for name, value in recorded.items()
        }
        tensors |= self.noise(_Answers(recorded, {tap.module: tap for tap in taps}), self.dtype)
        for dtype in ORACLE_DTYPES:
            if dtype != self.dtype:
                tensors |= self._load(_part(dtype))
        self.staging.save_part(self.name, ORACLE, tensors)

    def _exact(self) -> Named:
        exact = self._load(_part(_EXACT))
        return {
            (phase, name): exact[f"{phase}.{name}"]
            for phase, names in self._kept().items()
            for name in names
            if f"{phase}.{name}" in exact
        }

    def _kept(self) -> Mapping[Phase, tuple[str, ...]]:
        """Return the names of the floating-point tensors that are judged, by phase."""
        compared = {phase: self.family.judged_outputs(phase) for phase in self.family.compared}
        logits = (parts.LOGITS, *parts.POSITION_RECORDS) if self.family.logits else ()
        forward = (*logits, *self.family.whole_outputs)
        return {**compared, Phase.FORWARD: forward, Phase.GENERATE: (_STEPS,)}

    def _require_same_integers(
        self, outputs: Mapping[Phase, Mapping[str, torch.Tensor]], dtype: str
    ) -> None:
        """Raise ReferenceUnavailable if integers differ, such as position ids: no rounding."""
        for phase, tensors in outputs.items():
            kept = self._load(phase_file(phase))
            for name, tensor in tensors.items():
                if not tensor.is_floating_point() and not torch.equal(tensor, kept[name]):
                    raise ReferenceUnavailable(
                        f"in {dtype} this transformers computes another function than in "
                        f"{self.dtype}: {phase} {name} of case {self.name} differ",
                        "record without --oracle, or with transformers 4.51.3",
                    )

    def _load(self, file: str) -> dict[str, torch.Tensor]:
        path = self.staging.part(self.name, file)
        return load_file(path) if path.exists() else {}


def _error(exact: Sketch | None, other: Sketch | None) -> float:
    return NO_NOISE if exact is None or other is None else relative_error(exact, other)
