"""The oracle of a recording: the reference again, in float64 and in every dtype of a candidate.

One model is in memory at a time. The float64 answers are staged as they are; those of other dtypes
only as their distance to them, position by position.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from snapshot_tool.base.errors import ReferenceUnavailable
from snapshot_tool.base.localisation import NO_NOISE
from snapshot_tool.base.phases import Phase
from snapshot_tool.base.protocol import Progress, Reference, ReferenceInfo
from snapshot_tool.base.sketch import Sketch, relative_error
from snapshot_tool.base.tap import Tap, TapRecorder
from snapshot_tool.base.tolerance import HALF_DTYPES, ORACLE_DTYPES
from snapshot_tool.families import family_of
from snapshot_tool.families.family import Family
from snapshot_tool.goldens import parts
from snapshot_tool.goldens.layout import INPUTS, ORACLE, TAPS, phase_file
from snapshot_tool.goldens.oracle import delta_key, noise_key, step_noise_key, tap_noise_key
from snapshot_tool.numerics.float64_rule import position_noise
from snapshot_tool.record.plan import Plan, Staging

if TYPE_CHECKING:
    import torch

_EXACT = "float64"
_EXACT_TAPS = "oracle.taps.safetensors"
_STEPS = "step_topk_values"

Named = dict[tuple[Phase, str], "torch.Tensor"]
LoadReference = Callable[[str], Reference]


@dataclass(frozen=True, slots=True)
class _Answers:
    """What one run in one dtype says of what a golden set keeps of a case."""

    tensors: Named
    taps: Mapping[str, Tap]

    @property
    def are_finite(self) -> bool:
        """Whether no answer has NaN or Inf in it."""
        return all(bool(tensor.isfinite().all()) for tensor in self.tensors.values())


def stage_oracle(
    staging: Staging,
    plan: Plan,
    info: ReferenceInfo,
    *,
    own_dtype: str,
    load: LoadReference,
    progress: Progress,
) -> None:
    """Stage the oracle's part of every case; `load` gives the reference in a dtype."""
    keepers = [_Keeper(staging, info, own_dtype, plan.settings.seed, c.name) for c in plan.cases]
    for dtype in (_EXACT, *(d for d in ORACLE_DTYPES if d != own_dtype)):
        missing = [k for k in keepers if not staging.part(k.case, _part(dtype)).exists()]
        if missing:
            _stage_dtype(missing, dtype, load=load, progress=progress)
    for keeper in keepers:
        if not staging.part(keeper.case, ORACLE).exists():
            keeper.join()


def _stage_dtype(
    missing: list[_Keeper], dtype: str, *, load: LoadReference, progress: Progress
) -> None:
    reference = load(dtype)
    overflows = 0
    with progress.stage(f"oracle: {dtype}", len(missing)) as steps:
        for keeper in missing:
            answers = keeper.ask(reference, dtype)
            if dtype == _EXACT:
                keeper.save_exact(answers)
            else:
                keeper.save_noise(answers, dtype)
            overflows += not answers.are_finite
            next(steps)
    if overflows:
        progress.note(
            f"in {dtype} the reference answers NaN or Inf in {overflows} of {len(missing)} cases: "
            f"they cannot be checked in {dtype}"
        )


def _part(dtype: str) -> str:
    return f"oracle.{dtype}.safetensors"


@dataclass(frozen=True, slots=True)
class _Keeper:
    """One case: what is recorded of it, what runs in other dtypes say, and how far apart it is."""

    staging: Staging
    info: ReferenceInfo
    dtype: str
    seed: int
    case: str

    def ask(self, reference: Reference, dtype: str) -> _Answers:
        """Run the reference on the case and on the recorded tokens after it."""
        inputs = parts.read_inputs(self.staging.part(self.case, INPUTS))
        recorder = TapRecorder(self.seed, inputs.attention_mask)
        generated = self._load(phase_file(Phase.GENERATE))
        # Read here: a run in float64 reads float32 from a file as what it is not.
        recorded = self._vision_features()
        run = reference.forward(
            inputs,
            observe=recorder,
            continuation=generated[parts.TOKEN_IDS][:-1] if generated else None,
            ask_connector=None if recorded is None else lambda _own: recorded,
        )
        self._require_same_function(run.outputs, dtype)
        tensors: Named = {
            (phase, name): parts.without_padding(run.outputs[phase][name], inputs)
            for phase, names in self._kept().items()
            for name in names
            if name in run.outputs.get(phase, {})
        }
        if run.logits is not None:
            logits = run.logits.float() if dtype in HALF_DTYPES else run.logits
            length = inputs.input_ids.shape[1]
            tensors |= self._logits(logits[:length][parts.real_positions(inputs)])
            if generated:
                steps = logits[length - 1 :].gather(-1, generated["step_topk_ids"])
                tensors[Phase.GENERATE, _STEPS] = steps
        return _Answers(tensors, recorder.by_module())

    def save_exact(self, answers: _Answers) -> None:
        """Stage the float64 answers whole."""
        taps = parts.tap_tensors(list(answers.taps.values()), self.info.modules)
        tensors = {f"{phase}.{name}": t for (phase, name), t in answers.tensors.items()}
        self.staging.save_part(self.case, _EXACT_TAPS, taps)
        self.staging.save_part(self.case, _part(_EXACT), tensors)

    def save_noise(self, answers: _Answers, dtype: str) -> None:
        """Stage how far another dtype's answers are from the float64 ones."""
        self.staging.save_part(self.case, _part(dtype), self._noise(answers, dtype))

    def join(self) -> None:
        """Put together what the golden set keeps: deltas, and the errors in every dtype."""
        import torch

        recorded = self._recorded()
        exact = self._exact()
        # Three digits of a float32 rounding error say enough; of a half-precision one they do not.
        kept = torch.bfloat16 if self.dtype == "float32" else torch.float32
        tensors = {
            delta_key(*name): (exact[name] - value.double()).to(kept)
            for name, value in recorded.tensors.items()
        }
        tensors |= self._noise(recorded, self.dtype)
        for dtype in ORACLE_DTYPES:
            if dtype != self.dtype:
                tensors |= self._load(_part(dtype))
        self.staging.save_part(self.case, ORACLE, tensors)

    def _noise(self, answers: _Answers, dtype: str) -> dict[str, torch.Tensor]:
        import torch

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
        modules = self.info.modules
        exact = {tap.module: tap for tap in parts.read_taps(self._load(_EXACT_TAPS), modules)}
        rows = []
        for tap in parts.read_taps(self._load(TAPS), modules):
            one, other = exact.get(tap.module), taps.get(tap.module)
            rows.append(
                (_error(one.input, other.input), _error(one.output, other.output))
                if one and other
                else (NO_NOISE, NO_NOISE)
            )
        return rows

    def _recorded(self) -> _Answers:
        """Return the golden's own answers, in the form of a run."""
        tensors: Named = {}
        for phase, names in self._kept().items():
            stored = self._load(phase_file(phase))
            tensors |= {(phase, name): stored[name] for name in names if name in stored}
        taps = parts.read_taps(self._load(TAPS), self.info.modules)
        return _Answers(tensors, {tap.module: tap for tap in taps})

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
        compared = {phase: self._family.judged_outputs(phase) for phase in self._family.compared}
        logits = (parts.LOGITS, *parts.POSITION_RECORDS) if self._family.logits else ()
        forward = (*logits, *self._family.whole_outputs)
        return {**compared, Phase.FORWARD: forward, Phase.GENERATE: (_STEPS,)}

    @property
    def _family(self) -> Family:
        return family_of(self.info.family)

    def _vision_features(self) -> torch.Tensor | None:
        """Return the recorded output of vision, which the connector is fed with."""
        name = self._family.compared.get(Phase.VISION, "")
        return self._load(phase_file(Phase.VISION)).get(name)

    def _logits(self, real: torch.Tensor) -> Named:
        kept = self._load(phase_file(Phase.FORWARD))
        records = parts.position_records(
            real, topk_ids=kept["position_topk_ids"], sample_ids=kept["position_sample_ids"]
        )
        records[parts.LOGITS] = real[-1]
        return {(Phase.FORWARD, name): tensor for name, tensor in records.items()}

    def _require_same_function(
        self, outputs: Mapping[Phase, Mapping[str, torch.Tensor]], dtype: str
    ) -> None:
        """Raise where integers differ, such as position ids: that is no rounding."""
        import torch

        for phase, tensors in outputs.items():
            kept = self._load(phase_file(phase))
            for name, tensor in tensors.items():
                if not tensor.is_floating_point() and not torch.equal(tensor, kept[name]):
                    raise ReferenceUnavailable(
                        f"in {dtype} this transformers computes another function than in "
                        f"{self.dtype}: {phase} {name} of case {self.case} differ",
                        "record without --oracle, or with transformers 4.51.3",
                    )

    def _load(self, file: str) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        path = self.staging.part(self.case, file)
        return load_file(path) if path.exists() else {}


def _error(exact: Sketch | None, other: Sketch | None) -> float:
    return NO_NOISE if exact is None or other is None else relative_error(exact, other)
