"""Asking the reference: one forward pass and one generation a case, staged as soon as answered."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import TYPE_CHECKING

from snapshot_tool.core.interfaces import CaseInputs, Progress, Reference
from snapshot_tool.core.phases import Phase
from snapshot_tool.core.taps import Side, Sketchbook
from snapshot_tool.recording.plan import Plan
from snapshot_tool.recording.shortening import Shortener
from snapshot_tool.recording.staging import Staging
from snapshot_tool.store import parts
from snapshot_tool.store.layout import INPUTS, OUTPUTS, TAPS, phase_file
from snapshot_tool.store.manifest import Storage

if TYPE_CHECKING:
    import torch

# One run of the model from end to end answers these.
FORWARD_PASS = frozenset({Phase.VISION, Phase.CONNECTOR, Phase.FORWARD})


def generated_text_file() -> str:
    """Return the name of the part that holds a case's generated text."""
    return f"{Phase.GENERATE.value}.txt"


def stage_answers(
    staging: Staging, plan: Plan, *, reference: Reference, progress: Progress
) -> None:
    """Ask for everything that is planned and not staged yet."""
    asker = _Asker(staging, plan, reference)
    with progress.stage("recording cases", len(plan.cases)) as steps:
        for case in plan.cases:
            inputs = parts.read_inputs(staging.part(case.name, INPUTS))
            asker.stage_forward(case.name, inputs)
            asker.stage_generation(case.name, inputs)
            next(steps)


@dataclass(frozen=True, slots=True)
class _Asker:
    staging: Staging
    plan: Plan
    reference: Reference

    def stage_forward(self, case: str, inputs: CaseInputs) -> None:
        """Run the model once and stage vision, connector, forward and taps."""
        settings = self.plan.settings
        wanted = FORWARD_PASS & set(settings.phases)
        # taps.safetensors is written last of a forward pass: its presence says the pass is staged.
        if not wanted or self.staging.part(case, TAPS).exists():
            return
        book = Sketchbook(settings.seed, inputs.attention_mask)
        whole: dict[str, torch.Tensor] = {}

        def observe(module: str, side: Side, tensor: torch.Tensor) -> None:
            book(module, side, tensor)
            if keep_whole and side is Side.OUTPUT and tensor.is_floating_point():
                # A copy: a later module may write into it.
                whole.setdefault(module, tensor.to("cpu", copy=True))

        keep_whole = any(fnmatch.fnmatchcase(case, glob) for glob in settings.whole_outputs)
        short = Shortener(settings.seed) if settings.storage is Storage.COMPACT else None
        ask_connector = short.ask_connector if short else None
        answer = self.reference.forward(inputs, observe=observe, ask_connector=ask_connector)
        for phase in wanted:
            outputs = answer.outputs.get(phase, {})
            tensors = {name: parts.without_padding(t, inputs) for name, t in outputs.items()}
            tensors = short.shorten(phase, tensors) if short else tensors
            if phase is Phase.FORWARD and answer.logits is not None:
                tensors |= parts.forward_tensors(answer.logits, inputs, seed=settings.seed)
            if tensors:
                self.staging.save_part(case, phase_file(phase), tensors)
        if whole:
            self.staging.save_part(case, OUTPUTS, whole)
        taps = parts.tap_tensors(book.taps(), self.reference.info().modules)
        self.staging.save_part(case, TAPS, taps)

    def stage_generation(self, case: str, inputs: CaseInputs) -> None:
        """Generate and stage the tokens, with their text."""
        settings = self.plan.settings
        file = phase_file(Phase.GENERATE)
        if Phase.GENERATE not in settings.phases or self.staging.part(case, file).exists():
            return
        generation = self.reference.generate(inputs, max_new_tokens=settings.max_new_tokens)
        text = generation.text.encode("utf-8", "replace")
        self.staging.save_bytes(case, generated_text_file(), text)
        self.staging.save_part(case, file, parts.generate_tensors(generation))
