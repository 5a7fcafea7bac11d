"""What a port answers on the recorded cases, for the rules of other projects to compare."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch

from snapshot_tool.base.protocol import Phase
from snapshot_tool.candidates.fms.candidate import FmsCandidate
from snapshot_tool.families.idefics3 import CONNECTOR_OUTPUT
from snapshot_tool.families.siglip_vision import VISION_OUTPUT
from snapshot_tool.goldens.golden import Golden
from snapshot_tool.goldens.parts import LOGITS, TOKEN_IDS
from tests.mutants.probes import Float64Throughout
from tests.mutants.rules import Answers, Part

# The parity suite has the images of this case only before the phase forward.
_IMAGES_OF = "one-image"


def read_answers(candidate: FmsCandidate, golden: Golden) -> Answers:
    """Run a port on every recorded case; an answer that it raises in place of is left out."""
    answers: dict[Part, dict[str, torch.Tensor]] = {part: {} for part in Part}

    def keep(case: str, compute: Callable[[], dict[Part, torch.Tensor]]) -> None:
        try:
            found = compute()
        except (Exception, SystemExit):  # a faulty port may even exit
            return
        for part, tensor in found.items():
            answers[part][case] = tensor.clone()

    with torch.inference_mode():
        for case in golden.cases:
            if case == _IMAGES_OF:
                for ask in (_pixels, _vision, _connector):
                    keep(case, partial(ask, candidate, golden, case))
            for ask in (_logits, _generation, _forced_generation):
                keep(case, partial(ask, candidate, golden, case))
    return answers


def float64_logits(candidate: FmsCandidate, golden: Golden) -> dict[str, torch.Tensor]:
    """Return a float64 port's logits by case, as Part.LOGITS has them."""
    found = {}
    with torch.inference_mode():
        for case in golden.cases:
            inputs = golden.inputs(case)
            with Float64Throughout():
                logits = candidate.forward(inputs)
            found[case] = logits[inputs.attention_mask.bool()].clone()
    return found


def hugging_face_answers(
    port: Answers, double: Mapping[str, torch.Tensor], golden: Golden
) -> Answers:
    """Return the reference's answers: the recorded ones, and the unchanged port's for the rest.

    A golden set keeps whole logits of the last token only. Those of the unchanged port differ from
    Hugging Face's by rounding.

    double: the unchanged port's logits in float64.
    """
    answers = {part: dict(found) for part, found in port.items()}
    answers[Part.DOUBLE] = dict(double)
    for case in golden.cases:
        tokens = golden.tensor(case, Phase.GENERATE, TOKEN_IDS)
        answers[Part.TOKENS][case] = answers[Part.CHOSEN][case] = tokens
        last = golden.tensor(case, Phase.FORWARD, LOGITS)
        before = answers[Part.LOGITS][case][:-1]
        answers[Part.LOGITS][case] = torch.cat([before, last[None]])
    pixels = golden.inputs(_IMAGES_OF).pixel_values
    assert pixels is not None
    answers[Part.PIXELS] = {_IMAGES_OF: pixels}
    answers[Part.VISION] = {_IMAGES_OF: golden.tensor(_IMAGES_OF, Phase.VISION, VISION_OUTPUT)}
    connector = golden.tensor(_IMAGES_OF, Phase.CONNECTOR, CONNECTOR_OUTPUT)
    answers[Part.CONNECTOR] = {_IMAGES_OF: connector}
    return answers


_Found = dict[Part, torch.Tensor]


def _pixels(candidate: FmsCandidate, golden: Golden, case: str) -> _Found:
    return {Part.PIXELS: candidate.preprocess(golden.images(case))["pixel_values"]}


def _vision(candidate: FmsCandidate, golden: Golden, case: str) -> _Found:
    return {Part.VISION: candidate.vision(golden.inputs(case).pixel_values)}


def _connector(candidate: FmsCandidate, golden: Golden, case: str) -> _Found:
    features = golden.tensor(case, Phase.VISION, VISION_OUTPUT)
    return {Part.CONNECTOR: candidate.connector(features)}


def _logits(candidate: FmsCandidate, golden: Golden, case: str) -> _Found:
    inputs = golden.inputs(case)
    return {Part.LOGITS: candidate.forward(inputs)[inputs.attention_mask.bool()]}


def _generation(candidate: FmsCandidate, golden: Golden, case: str) -> _Found:
    new = candidate.generate(
        golden.inputs(case),
        max_new_tokens=golden.manifest.generation.max_new_tokens,
        eos_token_ids=golden.eos_token_ids(case),
    )
    return {Part.TOKENS: new}


def _forced_generation(candidate: FmsCandidate, golden: Golden, case: str) -> _Found:
    """Generate the recorded tokens, whatever the port chooses, and keep what it does choose."""
    tokens = golden.tensor(case, Phase.GENERATE, TOKEN_IDS)
    steps: list[torch.Tensor] = []
    chosen: list[torch.Tensor] = []

    def force(_place: int, logits: torch.Tensor, choice: torch.Tensor, kwargs: Any) -> Any:
        forced = tokens[len(steps)].to(choice).expand_as(choice)
        steps.append(logits[0].clone())
        chosen.append(choice[0, 0].clone())
        return forced, kwargs

    with _after_each_step(force):
        candidate.generate(golden.inputs(case), max_new_tokens=len(tokens), eos_token_ids=())
    ends = torch.isin(tokens, torch.tensor(golden.eos_token_ids(case)))
    return {Part.STEPS: torch.stack(steps), Part.CHOSEN: torch.stack(chosen), Part.ENDS: ends}


@contextmanager
def _after_each_step(hook: Callable[..., Any]) -> Iterator[None]:
    """Let FMS's generation loop call a hook, as aiu-fms-testing-utils does."""
    from fms.models.idefics3_components import fms_model

    loop = partial(fms_model.generate, post_iteration_hook=hook)
    with mock.patch.object(fms_model, "generate", loop):
        yield
