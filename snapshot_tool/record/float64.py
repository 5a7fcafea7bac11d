"""The float64 reference of a recording: the reference again, in float64 and in other dtypes.

One model is in memory at a time. The float64 outputs are staged whole, those of other dtypes only
as their distance to them, position by position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from snapshot_tool.base.errors import ReferenceUnavailable
from snapshot_tool.base.localisation import NO_NOISE
from snapshot_tool.base.protocol import Phase, Progress, ReferenceInfo, Side
from snapshot_tool.base.tolerance import HALF_DTYPES, ORACLE_DTYPES
from snapshot_tool.diagnose.modules import Isolator
from snapshot_tool.families import family_of
from snapshot_tool.families.family import Family
from snapshot_tool.goldens import parts
from snapshot_tool.goldens.layout import INPUTS, MODULE_INPUTS, ORACLE, OUTPUTS, TAPS, phase_file
from snapshot_tool.goldens.parts import DELTA, MODULE_NOISE, NOISE, STEP_NOISE, TAP_NOISE
from snapshot_tool.numerics.compare import position_noise
from snapshot_tool.record.plan import Plan, Recording, Staging
from snapshot_tool.taps.sketches import Sketch, Tap, TapRecorder, relative_error

if TYPE_CHECKING:
    from snapshot_tool.reference.huggingface import HuggingFaceReference

_EXACT = "float64"
_EXACT_TAPS = "oracle.taps.safetensors"
_BY_ITSELF = "oracle.modules.{}.safetensors"
_STEPS = "step_topk_values"

# The outputs of one run that a golden set keeps of a case, by phase and name.
Named = dict[tuple[Phase, str], torch.Tensor]


def stage_float64(
    recording: Recording, plan: Plan, info: ReferenceInfo, progress: Progress
) -> None:
    """Stage oracle.safetensors of every case, if the plan has an oracle."""
    if not plan.settings.oracle:
        return
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
                answers, taps = case.run(reference, dtype)
                case.save_noise_by_itself(reference, dtype)
                if dtype == _EXACT:
                    case.save_exact(answers, taps)
                else:
                    staging.save_part(case.name, _part(dtype), case.noise(answers, taps, dtype))
                overflows += not all(bool(tensor.isfinite().all()) for tensor in answers.values())
                next(steps)
        del reference  # before the next one is loaded
        if overflows:
            progress.note(
                f"in {dtype} the reference returns NaN or Inf in {overflows} of {len(missing)} "
                f"cases: they cannot be checked in {dtype}"
            )
    for case in cases:
        if not staging.part(case.name, ORACLE).exists():
            case.join()


def _part(dtype: str) -> str:
    return f"oracle.{dtype}.safetensors"


@dataclass(frozen=True, slots=True)
class _Case:
    """One case: its recorded outputs, those in other dtypes, and the distances between them."""

    staging: Staging
    name: str
    family: Family
    modules: tuple[str, ...]
    dtype: str
    seed: int

    def run(self, reference: HuggingFaceReference, dtype: str) -> tuple[Named, list[Tap]]:
        """Run the reference on the case and on the recorded tokens after it.

        Return the outputs and the taps.
        """
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
        answers: Named = {
            (phase, name): parts.without_padding(run.outputs[phase][name], inputs)
            for phase, name in self._kept()
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
            answers |= {(Phase.FORWARD, name): tensor for name, tensor in records.items()}
            if generated:
                steps = logits[length - 1 :].gather(-1, generated["step_topk_ids"])
                answers[Phase.GENERATE, _STEPS] = steps
        return answers, recorder.taps()

    def save_exact(self, answers: Named, taps: Sequence[Tap]) -> None:
        """Stage the float64 outputs whole."""
        tensors = {f"{phase}.{name}": tensor for (phase, name), tensor in answers.items()}
        self.staging.save_part(self.name, _EXACT_TAPS, parts.tap_tensors(taps, self.modules))
        self.staging.save_part(self.name, _part(_EXACT), tensors)

    def noise(self, answers: Named, taps: Sequence[Tap], dtype: str) -> dict[str, torch.Tensor]:
        """Return how far the outputs in a dtype are from the float64 ones."""
        exact = self._exact()
        tensors = {
            NOISE.format(*key, dtype): position_noise(value, exact[key])
            for key, value in answers.items()
        }
        steps = Phase.GENERATE, _STEPS
        if steps in answers:
            errors = answers[steps].double() - exact[steps]
            tensors[STEP_NOISE.format(dtype)] = errors.abs().amax(-1).float()
        tensors[TAP_NOISE.format(dtype)] = torch.tensor(self._tap_noise(taps))
        return tensors

    def save_noise_by_itself(self, reference: HuggingFaceReference, dtype: str) -> None:
        """Stage the errors of each module on its recorded input, if that was kept.

        They are taken from what was recorded, so those of float64 are the recorded dtype's own.
        """
        given = self._load(MODULE_INPUTS)
        if not given:
            return
        recorded = {(module, Side.INPUT): tensor for module, tensor in given.items()}
        outputs = self._load(OUTPUTS).items()
        recorded |= {(module, Side.OUTPUT): tensor for module, tensor in outputs}
        inputs = parts.read_inputs(self.staging.part(self.name, INPUTS))
        isolator = Isolator(recorded, self.seed, inputs.attention_mask)
        reference.forward(inputs, observe=isolator)
        errors = isolator.errors
        taps = self._taps(TAPS)
        rows = [[errors.get((tap.module, side), NO_NOISE) for side in Side] for tap in taps]
        computed = self.dtype if dtype == _EXACT else dtype
        noise = {MODULE_NOISE.format(computed): torch.tensor(rows)}
        self.staging.save_part(self.name, _BY_ITSELF.format(computed), noise)

    def _tap_noise(self, taps: Sequence[Tap]) -> list[tuple[float, float]]:
        """Return the errors of input and output for each recorded tap, in its order."""
        exact = {tap.module: tap for tap in self._taps(_EXACT_TAPS)}
        found = {tap.module: tap for tap in taps}
        rows = []
        for tap in self._taps(TAPS):
            one, other = exact.get(tap.module), found.get(tap.module)
            rows.append(
                (_error(one.input, other.input), _error(one.output, other.output))
                if one and other
                else (NO_NOISE, NO_NOISE)
            )
        return rows

    def join(self) -> None:
        """Stage what the golden set keeps: deltas, and the errors in every dtype."""
        stored = {phase: self._load(phase_file(phase)) for phase in Phase}
        recorded = {
            (phase, name): stored[phase][name]
            for phase, name in self._kept()
            if name in stored[phase]
        }
        exact = self._exact()
        # Three digits of a float32 rounding error are enough; of a half-precision one they are not.
        kept = torch.bfloat16 if self.dtype == "float32" else torch.float32
        tensors = {
            DELTA.format(*key): (exact[key] - value.double()).to(kept)
            for key, value in recorded.items()
        }
        tensors |= self.noise(recorded, self._taps(TAPS), self.dtype)
        for dtype in ORACLE_DTYPES:
            tensors |= self._load(_BY_ITSELF.format(dtype))
            if dtype != self.dtype:
                tensors |= self._load(_part(dtype))
        self.staging.save_part(self.name, ORACLE, tensors)

    def _exact(self) -> Named:
        exact = self._load(_part(_EXACT))
        names = {(phase, name): f"{phase}.{name}" for phase, name in self._kept()}
        return {key: exact[name] for key, name in names.items() if name in exact}

    def _taps(self, file: str) -> list[Tap]:
        return parts.read_taps(self._load(file), self.modules)

    def _kept(self) -> list[tuple[Phase, str]]:
        """Return the phase and the name of each floating-point tensor that is judged."""
        family = self.family
        kept = [(phase, name) for phase in family.compared for name in family.judged_outputs(phase)]
        logits = (parts.LOGITS, *parts.POSITION_RECORDS) if family.logits else ()
        forward = (*logits, *family.whole_outputs)
        return [*kept, *((Phase.FORWARD, n) for n in forward), (Phase.GENERATE, _STEPS)]

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
        return self.staging.load_part(self.name, file)


def _error(exact: Sketch | None, other: Sketch | None) -> float:
    return NO_NOISE if exact is None or other is None else relative_error(exact, other)
