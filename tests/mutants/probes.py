"""What a port computes in float64, for the recorded inputs and for more: does a mutant change it?

In float32 two ways to compute the same differ by rounding. In float64 throughout, only the fault
itself is left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch.overrides import TorchFunctionMode

from snapshot_tool.base.protocol import CandidateRequest, Phase
from snapshot_tool.candidates.fms.candidate import FmsCandidate, load_fms_candidate
from snapshot_tool.families import family_of
from snapshot_tool.goldens.find import open_checkpoint_of
from snapshot_tool.goldens.golden import Golden
from tests.mutants.candidates import Planted

# An answer is a tensor, or the name of the error that was raised in its place.
Answers = Mapping[str, torch.Tensor | str]
_Arguments = Mapping[str, torch.Tensor | None]

_NEW_TOKENS = 24


class Float64Throughout(TorchFunctionMode):
    """Give float64 to all code that requests float32, for example for a norm."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        def widen(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        if func is torch.Tensor.float:
            func = torch.Tensor.double
        wide = {name: widen(value) for name, value in (kwargs or {}).items()}
        return func(*map(widen, args), **wide)


@dataclass(frozen=True, slots=True)
class Originals:
    """What the unchanged port computes.

    Args:
        answers: in float64, by question: "phase/input".
        rounding: by phase, the greatest difference between float32 and float64.
    """

    answers: Answers
    rounding: Mapping[str, float]


def compute_originals(plan: Planted, golden: Golden) -> Originals:
    """Compute the unchanged port's answers. float64 becomes the default of this process."""
    assert plan.built is not None
    single = _answers(plan.built, golden, nullcontext)
    double = float64_answers(plan, golden)
    # Rounding in preprocessing may be the same in both: at least a float32's own.
    rounding = {phase.value: 0.0 for phase in Phase}
    for entry in golden.manifest.cases:
        for phase in entry.phases:
            one, other = (found[f"{phase}/{entry.name}"] for found in (single, double))
            assert isinstance(one, torch.Tensor)
            assert isinstance(other, torch.Tensor)
            if phase is not Phase.GENERATE:  # tokens are not rounded
                floor = 2 * torch.finfo(torch.float32).eps * float(other.abs().max())
                difference = float((one.double() - other.double()).abs().max())
                rounding[phase] = max(rounding[phase], difference, floor)
    return Originals(double, rounding)


def float64_answers(plan: Planted, golden: Golden) -> Answers:
    """Compute a planted port's answers in float64, which becomes the default of this process."""
    return _answers(load_float64(plan, golden), golden, Float64Throughout)


def load_planted(plan: Planted, golden: Golden, *, dtype: str) -> FmsCandidate:
    """Load a planted port without a check."""
    checkpoint = open_checkpoint_of(golden, None).folder
    request = CandidateRequest(checkpoint, golden.manifest.checkpoint.config, "cpu", dtype)
    plan.built = load_fms_candidate(request, fms_path=plan.checkout)
    plan.altered = plan.alter(plan.built)
    return plan.built


def load_float64(plan: Planted, golden: Golden) -> FmsCandidate:
    """Load a planted port in float64, which becomes the default of this process."""
    torch.set_default_dtype(torch.float64)
    candidate = load_planted(plan, golden, dtype="float64")
    parts = [part for module in candidate.model.modules() for part in vars(module).values()]
    for rotary in (part for part in parts if hasattr(part, "cached_freqs")):
        # FMS made these tables in float32 on loading: it makes them again.
        rotary.cached_freqs.clear()
        rotary.max_seq_len_cached.clear()
    return candidate


def greatest_change(originals: Originals, answers: Answers) -> tuple[float, str]:
    """Return the greatest difference from the original, in units of rounding, and the question."""
    changes = {
        question: _change(answer, answers[question], originals.rounding[question.partition("/")[0]])
        for question, answer in originals.answers.items()
    }
    question = max(changes, key=lambda name: changes[name])
    return changes[question], question


def _change(one: torch.Tensor | str, other: torch.Tensor | str, rounding: float) -> float:
    if isinstance(one, str) or isinstance(other, str):
        return 0.0 if type(one) is type(other) and one == other else math.inf
    if one.shape != other.shape:
        return math.inf
    difference = float((one.double() - other.double()).abs().max())
    if difference == 0:
        return 0.0
    return difference / rounding if rounding and math.isfinite(difference) else math.inf


def _answers(
    candidate: FmsCandidate, golden: Golden, context: Callable[[], AbstractContextManager[Any]]
) -> Answers:
    found: dict[str, torch.Tensor | str] = {}
    with torch.inference_mode():
        for question, compute in _questions(candidate, golden):
            try:
                with context():
                    found[question] = compute().clone()
            except Exception as error:
                found[question] = type(error).__name__
    return found


def _questions(
    candidate: FmsCandidate, golden: Golden
) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    encoder_output = family_of(golden.manifest.checkpoint.family).compared[Phase.VISION]
    for entry in golden.manifest.cases:
        pixels = golden.inputs(entry.name).pixel_values
        if pixels is not None:
            features = golden.tensor(entry.name, Phase.VISION, encoder_output)
            images = golden.images(entry.name)
            yield f"preprocessing/{entry.name}", partial(_pixels, candidate, images)
            yield f"vision/{entry.name}", partial(candidate.vision, pixels)
            yield f"connector/{entry.name}", partial(candidate.connector, features)
    for name, image in _other_images().items():
        yield f"preprocessing/{name}", partial(_pixels, candidate, [image])
    (end, *_) = golden.manifest.generation.eos_token_ids
    dtype = getattr(torch, candidate.request.dtype)
    for name, recorded in _prompts(golden).items():
        pixels = recorded["pixel_values"]
        prompt = {**recorded, "pixel_values": None if pixels is None else pixels.to(dtype)}
        yield f"forward/{name}", partial(_logits, candidate.model, prompt)
        yield f"generate/{name}", partial(_tokens, candidate.model, prompt, end)


def _pixels(candidate: FmsCandidate, images: Sequence[Image.Image]) -> torch.Tensor:
    return candidate.preprocess(images)["pixel_values"]


def _logits(model: Any, prompt: _Arguments) -> torch.Tensor:
    """Return the logits of the real tokens, (tokens, vocabulary)."""
    logits: torch.Tensor = model(**prompt)
    mask = prompt["attention_mask"]
    assert mask is not None
    return logits[mask.bool()]


def _tokens(model: Any, prompt: _Arguments, end: int) -> torch.Tensor:
    ids: torch.Tensor = model.generate(**prompt, max_new_tokens=_NEW_TOKENS, eos_token_id=end)
    return ids


def _prompts(golden: Golden) -> dict[str, _Arguments]:
    """Return the recorded prompts, batches of two with as many tiles, and one of every token."""
    cases: dict[int, list[str]] = {}
    for entry in golden.manifest.cases:
        cases.setdefault(entry.tiles, []).append(entry.name)
    pairs = [names[:2] for names in cases.values() if len(names) > 1]
    names = [[entry.name] for entry in golden.manifest.cases]
    names += [ordered for pair in pairs for ordered in (pair, pair[::-1])]
    config = golden.manifest.checkpoint.config
    ids = torch.arange(config["text_config"]["vocab_size"])
    ids = ids[ids != config["image_token_id"]][None]
    every = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": None}
    return {**{"+".join(batch): _batch(golden, batch) for batch in names}, "every-token": every}


def _batch(golden: Golden, names: Sequence[str]) -> _Arguments:
    """Return the model's arguments for cases as a batch, padded on the left."""
    cases = [golden.inputs(name) for name in names]
    length = max(case.input_ids.shape[1] for case in cases)
    pad = golden.manifest.generation.pad_token_id
    pixels = [case.pixel_values for case in cases if case.pixel_values is not None]
    return {
        "input_ids": torch.cat([_padded(case.input_ids, length, pad) for case in cases]),
        "attention_mask": torch.cat([_padded(case.attention_mask, length, 0) for case in cases]),
        "pixel_values": torch.stack(pixels) if pixels else None,
    }


def _padded(row: torch.Tensor, length: int, value: int) -> torch.Tensor:
    return torch.nn.functional.pad(row, (length - row.shape[1], 0), value=value)


def _other_images() -> dict[str, Image.Image]:
    """Return pictures of several modes and sizes, made from one with colour and transparency."""
    ramp = Image.linear_gradient("L").resize((90, 50))
    bands = (ramp, *(ramp.rotate(angle) for angle in (90, 180, 270)))
    picture = Image.merge("RGBA", bands)
    found = {mode: picture.convert(mode) for mode in ("RGB", "RGBA", "L", "P", "CMYK")}
    sizes = ((1, 1), (3, 200), (200, 3), (33, 31), (130, 97))
    return {**found, **{f"{w}x{h}": picture.convert("RGB").resize((w, h)) for w, h in sizes}}
