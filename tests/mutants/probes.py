"""Everything that a model answers: on the recorded inputs, and on more that no golden set has.

Comparing a mutant's answers with the original's, on one machine, tells whether the mutant changes
anything at all, whatever `snap check` says of it.
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

from snapshot_tool.base.phases import Phase
from snapshot_tool.candidates.fms.candidate import FmsCandidate
from snapshot_tool.families import family_of
from snapshot_tool.goldens import parts
from snapshot_tool.goldens.golden import Golden

# An answer is a tensor, or the name of the error that was raised in its place.
Answers = Mapping[str, torch.Tensor | str]
_Ask = Callable[[], torch.Tensor]
_Arguments = Mapping[str, torch.Tensor | None]

_NEW_TOKENS = 24
# Rounding that Hugging Face and the port happen to share is still rounding.
_FLOOR = 2 * torch.finfo(torch.float32).eps


@dataclass(frozen=True, slots=True)
class Originals:
    """What the unchanged port answers, and by phase how far rounding puts it off.

    Args:
        answers: by question.
        rounding: greatest difference between the port and Hugging Face, by phase.
        exact: the answers in float64 throughout.
    """

    answers: Answers
    rounding: Mapping[str, float]
    exact: Answers


def answers(
    candidate: FmsCandidate,
    golden: Golden,
    *,
    asked_within: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Answers:
    """Return all answers by question; each is asked in a context of its own."""
    found: dict[str, torch.Tensor | str] = {}
    with torch.inference_mode():
        for name, ask in _questions(candidate, golden):
            try:
                with asked_within():
                    found[name] = ask().clone()
            except Exception as error:
                found[name] = type(error).__name__
    return found


def _questions(candidate: FmsCandidate, golden: Golden) -> Iterator[tuple[str, _Ask]]:
    for entry in golden.manifest.cases:
        pixels = golden.inputs(entry.name).pixel_values
        if pixels is not None:
            vision = family_of(golden.manifest.checkpoint.family).compared[Phase.VISION]
            features = golden.tensor(entry.name, Phase.VISION, vision)
            images = golden.images(entry.name)
            yield f"preprocessing/{entry.name}", partial(_pixels, candidate, images)
            yield f"vision/{entry.name}", partial(candidate.vision, pixels)
            yield f"connector/{entry.name}", partial(candidate.connector, features)
    for name, image in _other_images().items():
        yield f"preprocessing/{name}", partial(_pixels, candidate, [image])
    (end, *_) = golden.manifest.generation.eos_token_ids
    dtype = getattr(torch, candidate.request.dtype)
    prompts = {**_recorded(golden), **_batches(golden), **_other_ids(golden)}
    for name, recorded in prompts.items():
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


def _recorded(golden: Golden) -> dict[str, _Arguments]:
    return {entry.name: _prompt(golden, (entry.name,)) for entry in golden.manifest.cases}


def _batches(golden: Golden) -> dict[str, _Arguments]:
    """Return two cases with as many tiles as a left-padded batch, in both orders."""
    cases: dict[int, list[str]] = {}
    for entry in golden.manifest.cases:
        cases.setdefault(entry.tiles, []).append(entry.name)
    pairs = [names[:2] for names in cases.values() if len(names) > 1]
    ordered = [(one, other) for pair in pairs for one, other in (pair, reversed(pair))]
    return {"+".join(pair): _prompt(golden, pair) for pair in ordered}


def _prompt(golden: Golden, names: tuple[str, ...]) -> _Arguments:
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


def _other_ids(golden: Golden) -> dict[str, _Arguments]:
    """Return a prompt of every token but the image's."""
    config = golden.manifest.checkpoint.config
    ids = torch.arange(config["text_config"]["vocab_size"])
    ids = ids[ids != config["image_token_id"]][None]
    every = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": None}
    return {"every-token": every}


def _other_images() -> dict[str, Image.Image]:
    """Return pictures of all sorts, made from one with colour and transparency."""
    ramp = Image.linear_gradient("L").resize((90, 50))
    bands = (ramp, *(ramp.rotate(angle) for angle in (90, 180, 270)))
    picture = Image.merge("RGBA", bands)
    found = {mode: picture.convert(mode) for mode in ("RGB", "RGBA", "L", "P", "CMYK")}
    sizes = ((1, 1), (3, 200), (200, 3), (33, 31), (130, 97))
    return {**found, **{f"{w}x{h}": picture.convert("RGB").resize((w, h)) for w, h in sizes}}


def rounding_of(found: Answers, golden: Golden) -> dict[str, float]:
    """Return, by phase, how far the unchanged port is from Hugging Face: that much is rounding."""
    greatest = {phase.value: 0.0 for phase in Phase}
    for entry in golden.manifest.cases:
        for phase in entry.phases:
            actual = found[f"{phase}/{entry.name}"]
            if phase is Phase.GENERATE or isinstance(actual, str):
                continue
            expected = _expected(golden, entry.name, phase)
            # Of the logits, a golden set has the last position's whole.
            actual = actual[-1] if phase is Phase.FORWARD else actual
            floor = _FLOOR * float(expected.abs().max())
            difference = float((actual - expected).abs().max())
            greatest[phase] = max(greatest[phase], difference, floor)
    return greatest


def _expected(golden: Golden, case: str, phase: Phase) -> torch.Tensor:
    if phase is Phase.PREPROCESSING:
        pixels = golden.inputs(case).pixel_values
        assert pixels is not None
        return pixels
    if phase is Phase.FORWARD:
        return golden.tensor(case, phase, parts.LOGITS)
    name = family_of(golden.manifest.checkpoint.family).compared[phase]
    return golden.tensor(case, phase, name)


def greatest_change(originals: Originals, other: Answers) -> tuple[float, str]:
    """Return the greatest difference from the original, in units of rounding, and the question."""
    changes = {
        question: _change(answer, other[question], originals.rounding[question.partition("/")[0]])
        for question, answer in originals.answers.items()
    }
    question = max(changes, key=lambda name: changes[name])
    return changes[question], question


def _change(one: torch.Tensor | str, other: torch.Tensor | str, rounding: float) -> float:
    if isinstance(one, str) or isinstance(other, str):
        return 0.0 if isinstance(one, str) and isinstance(other, str) and one == other else math.inf
    if one.shape != other.shape:
        return math.inf
    difference = float((one.double() - other.double()).abs().max())
    if difference == 0:
        return 0.0
    return difference / rounding if rounding and math.isfinite(difference) else math.inf
