"""The figures that a checkpoint must meet before it is written."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from builder.scenes import Pixels, gradient

NEW_TOKENS = 20
MIN_DISTINCT = 8  # different tokens in the answer to a fixed case
MAX_RUN = 3  # times that one token may follow itself
MIN_MARGIN_RATIO = 20.0  # smallest logit margin / largest float32 rounding error
NUDGE = 1.01  # what each weight is multiplied by, alone
MIN_EFFECT = 2.0  # how far beyond its tolerance that must move the phase

# (atol, rtol) of the phase that a weight belongs to: the project's defaults.
TOLERANCES = {"vision": (3e-4, 3e-4), "connector": (1e-5, 1e-5), "forward": (5e-5, 5e-5)}

ONE_IMAGE = "one-image"
TWO_IMAGES = "two-images"
# Each group shows that the answer follows the prompt (same images) or the images (same prompt).
SAME_IMAGES = (ONE_IMAGE, "colours", "title", "bare image", "chat")
SAME_PROMPT = (ONE_IMAGE, "inverse", "flat", "noise", "red circle", "four pixels", "wide", "tall")
NO_IMAGES = ("text", "prose", "unicode", "chat text", "chat empty")

Inputs = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Case:
    """A prompt and its images."""

    name: str
    prompt: str
    images: tuple[Image.Image, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """A greedy generation in float32, judged by the same one in float64.

    Attributes:
        tokens: the new ids.
        text: the same, decoded.
        margin: the smallest difference of the two largest logits over the steps.
        rounding: the largest |float32 - float64| of any logit, of the steps and of every position.
        largest: the largest |logit|.
        agrees: whether float64 gives the same ids.
    """

    tokens: tuple[int, ...]
    text: str
    margin: float
    rounding: float
    largest: float
    agrees: bool


@dataclass(frozen=True, slots=True)
class Effect:
    """How far nudging some weights moves their phase, in units of its tolerance."""

    phase: str
    name: str
    ratio: float
    required: bool


@dataclass(frozen=True, slots=True)
class Figures:
    """All that was measured, and what of it fell short."""

    answers: dict[str, Answer]
    effects: tuple[Effect, ...]
    shortcomings: tuple[str, ...]

    @property
    def margin(self) -> float:
        """The smallest logit margin over all greedy steps."""
        return min(answer.margin for answer in self.answers.values())

    @property
    def rounding(self) -> float:
        """The largest float32 rounding error of a logit over all cases."""
        return max(answer.rounding for answer in self.answers.values())


def _image(pixels: Pixels) -> Image.Image:
    return Image.fromarray(pixels)


def _red_circle() -> Image.Image:
    rows, columns = np.indices((300, 300))
    inside = (rows - 150) ** 2 + (columns - 150) ** 2 < 100**2
    pixels = np.where(inside[..., None], (225, 30, 35), (35, 70, 215))
    return _image(pixels.astype(np.uint8))


def build_cases(processor: Any) -> list[Case]:
    """Return the two fixed cases of the project and others of every sort."""
    describe = "Describe the image: <image>."
    ramp = gradient(512, 512)
    image, inverse = _image(ramp), _image(255 - ramp)
    flat = Image.new("RGB", (200, 200), (200, 40, 60))
    state = np.random.RandomState(7)
    noise = _image(state.randint(0, 256, size=(96, 120, 3)).astype(np.uint8))
    # No height of 1, 3 or 4 pixels: transformers takes such an RGB image for channels first.
    wide = _image(gradient(900, 6)[:, ::-1].copy())
    tall = Image.new("RGB", (2, 640), (35, 70, 215))
    tiny = Image.new("RGB", (2, 2), (240, 220, 50))

    def chat(text: str, *, with_image: bool) -> str:
        content = [{"type": "image"}] if with_image else []
        content.append({"type": "text", "text": text})
        messages = [{"role": "user", "content": content}]
        prompt: str = processor.apply_chat_template(messages, add_generation_prompt=True)
        return prompt

    return [
        Case(ONE_IMAGE, describe, (image,)),
        Case(TWO_IMAGES, "Compare: <image> then <image>.", (image, inverse)),
        Case("colours", "Which colours are in <image>?", (image,)),
        Case("title", "Write a caption for <image>:", (image,)),
        Case("bare image", "<image>", (image,)),
        Case("chat", chat("What do you see?", with_image=True), (image,)),
        Case("inverse", describe, (inverse,)),
        Case("flat", describe, (flat,)),
        Case("noise", describe, (noise,)),
        Case("red circle", describe, (_red_circle(),)),
        Case("four pixels", describe, (tiny,)),
        Case("wide", describe, (wide,)),
        Case("tall", describe, (tall,)),
        Case("swapped", "Compare: <image> then <image>.", (inverse, image)),
        Case("three images", "<image><image><image>", (flat, noise, tiny)),
        Case("between", "Before <image> and after", (_red_circle(),)),
        Case("unicode image", "Что на картинке 🎨? <image> 説明して", (flat,)),
        Case("text", "Tell me about blue."),
        Case("prose", "Once upon"),
        Case("unicode", "Ünïcödé ☃ 数字 ١٢٣ e\u0301"),
        Case("chat text", chat("Tell me about green.", with_image=False)),
        Case("chat empty", chat("", with_image=False)),
    ]


def encode(case: Case, processor: Any) -> Inputs:
    """Return the model's inputs for a case."""
    images = [list(case.images)] if case.images else None
    return dict(processor(text=[case.prompt], images=images, return_tensors="pt"))


def _in_float64(inputs: Inputs) -> Inputs:
    return {
        name: value.double() if value.is_floating_point() else value
        for name, value in inputs.items()
    }


@torch.no_grad()
def _generate(model: Any, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return all ids (1, length) and the logits of each step (steps, vocab)."""
    output = model.generate(
        **inputs,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return output.sequences, torch.cat(output.logits)


@torch.no_grad()
def _all_logits(model: Any, inputs: Inputs) -> Tensor:
    logits: Tensor = model(**inputs).logits
    return logits


def answer_case(model: Any, oracle: Any, inputs: Inputs, processor: Any) -> Answer:
    """Generate greedily in float32 and float64 and compare."""
    exact = _in_float64(inputs)
    ids, logits = _generate(model, inputs)
    oracle_ids, oracle_logits = _generate(oracle, exact)
    agrees = torch.equal(ids, oracle_ids)
    rounding = float((_all_logits(model, inputs) - _all_logits(oracle, exact)).abs().max())
    if agrees:
        rounding = max(rounding, float((logits - oracle_logits).abs().max()))
    best = logits.topk(2).values
    tokens = tuple(ids[0, inputs["input_ids"].shape[1] :].tolist())
    return Answer(
        tokens=tokens,
        text=processor.tokenizer.decode(tokens),
        margin=float((best[:, 0] - best[:, 1]).min()),
        rounding=rounding,
        largest=float(logits.abs().max()),
        agrees=agrees,
    )


@contextmanager
def _nudged(parameters: list[Tensor]) -> Iterator[None]:
    kept = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(NUDGE)
        yield
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)


def _phases(model: Any, inputs: Inputs) -> dict[str, Callable[[], Tensor]]:
    """Return how to run each phase, fed with what the reference gives it."""
    tiles = inputs["pixel_values"][0]

    def vision() -> Tensor:
        features: Tensor = model.model.vision_model(tiles).last_hidden_state
        return features

    with torch.no_grad():
        features = vision()
    return {
        "vision": vision,
        "connector": lambda: model.model.connector(features),
        "forward": lambda: _all_logits(model, inputs)[:, -1],
    }


def _phase_of(name: str) -> str:
    if name.startswith("model.vision_model."):
        return "vision"
    return "connector" if name.startswith("model.connector.") else "forward"


def _fused_name(name: str) -> str:
    """Return the name of the fused tensor that FMS makes a weight part of, or its own name."""
    for part in ("q_proj", "k_proj", "v_proj"):
        name = name.replace(part, "qkv_fused")
    for part in ("gate_proj", "up_proj"):
        name = name.replace(part, "gate_up_fused")
    return name


def _groups(model: Any) -> dict[str, list[Tensor]]:
    """Return each weight alone and, besides, each fused group of them."""
    groups: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        groups.setdefault(name, []).append(parameter)
        if _fused_name(name) != name:
            groups.setdefault(_fused_name(name), []).append(parameter)
    return groups


@torch.no_grad()
def measure_effects(model: Any, inputs: Inputs) -> tuple[Effect, ...]:
    """Return what nudging each weight, and each fused group, does to its phase."""
    phases = _phases(model, inputs)
    expected = {phase: run() for phase, run in phases.items()}
    effects = []
    for name, parameters in _groups(model).items():
        phase = _phase_of(name)
        atol, rtol = TOLERANCES[phase]
        with _nudged(parameters):
            moved = (phases[phase]() - expected[phase]).abs()
        ratio = float((moved / (atol + rtol * expected[phase].abs())).max())
        # softmax does not see a constant: a key's bias alone has no effect, in any model.
        effects.append(Effect(phase, name, ratio, required=not name.endswith("k_proj.bias")))
    return tuple(effects)


def _longest_run(tokens: tuple[int, ...]) -> int:
    longest = run = 1
    for previous, token in pairwise(tokens):
        run = run + 1 if token == previous else 1
        longest = max(longest, run)
    return longest


def _variety_shortcomings(answers: dict[str, Answer]) -> Iterator[str]:
    for name in (ONE_IMAGE, TWO_IMAGES):
        distinct = len(set(answers[name].tokens))
        if distinct < MIN_DISTINCT:
            yield f"{name}: {distinct} different tokens, less than {MIN_DISTINCT}"
    for name, answer in answers.items():
        if _longest_run(answer.tokens) > MAX_RUN:
            yield f"{name}: one token {_longest_run(answer.tokens)} times in a row"
    for group in (SAME_IMAGES, SAME_PROMPT, NO_IMAGES, (TWO_IMAGES, "swapped")):
        for first, second in combinations(group, 2):
            if answers[first].tokens == answers[second].tokens:
                yield f"{first} and {second}: the same answer"


def _shortcomings(answers: dict[str, Answer], effects: tuple[Effect, ...]) -> Iterator[str]:
    yield from _variety_shortcomings(answers)
    for name, answer in answers.items():
        if not answer.agrees:
            yield f"{name}: float64 gives other ids"
    margin = min(answer.margin for answer in answers.values())
    rounding = max(answer.rounding for answer in answers.values())
    if margin < MIN_MARGIN_RATIO * rounding:
        yield f"margin {margin:.3g} is under {MIN_MARGIN_RATIO:g} times the rounding {rounding:.3g}"
    for effect in effects:
        if effect.required and effect.ratio < MIN_EFFECT:
            yield f"{effect.name}: moves {effect.phase} by {effect.ratio:.3g} tolerances only"


def measure(model: Any, processor: Any) -> Figures:
    """Measure everything on a model in float32, as it was loaded from its folder."""
    oracle = copy.deepcopy(model).double()
    answers: dict[str, Answer] = {}
    effects: tuple[Effect, ...] = ()
    for case in build_cases(processor):
        inputs = encode(case, processor)
        answers[case.name] = answer_case(model, oracle, inputs, processor)
        if case.name == ONE_IMAGE:
            effects = measure_effects(model, inputs)
    return Figures(answers, effects, tuple(_shortcomings(answers, effects)))


def _effect_lines(effects: tuple[Effect, ...]) -> Iterator[str]:
    yield ""
    yield f"smallest effects of one weight times {NUDGE}, in tolerances (at least {MIN_EFFECT:g}):"
    for phase in TOLERANCES:
        found = sorted((e for e in effects if e.phase == phase), key=lambda effect: effect.ratio)
        required = [effect for effect in found if effect.required]
        yield f"  {phase}: {len(required)} weights and fused groups"
        for effect in required[:4]:
            yield f"    {effect.ratio:8.1f}  {effect.name.removeprefix('model.')}"
        for effect in (e for e in found if not e.required):
            name = effect.name.removeprefix("model.")
            yield f"    {effect.ratio:8.1g}  {name} (alone: none, by softmax invariance)"


def report(figures: Figures) -> str:
    """Return the figures as a table."""
    lines = [f"{'case':<14}{'tokens':>7}{'distinct':>9}{'margin':>9}{'rounding':>10}{'|logit|':>8}"]
    for name, answer in figures.answers.items():
        lines.append(
            f"{name:<14}{len(answer.tokens):>7}{len(set(answer.tokens)):>9}{answer.margin:>9.2g}"
            f"{answer.rounding:>10.2g}{answer.largest:>8.3g}"
        )
    ratio = figures.margin / figures.rounding
    lines += [
        "",
        f"smallest margin {figures.margin:.3g}, largest rounding {figures.rounding:.3g}:",
        f"  ratio {ratio:.0f} (at least {MIN_MARGIN_RATIO:g})",
        *_effect_lines(figures.effects),
        "",
        *(f"{name}: {answer.text!r}" for name, answer in figures.answers.items()),
    ]
    return "\n".join(lines)
