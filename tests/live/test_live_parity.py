"""FMS beside live Hugging Face, as in the parity suite, on the tests' FMS checkout.

The checkout has the interface that the suite uses, `get_model("hf_pretrained", variant=dir)`
included. transformers 4.57 computes other vision position ids in float32 than 4.51.3.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from snapshot_tool.base.images import render
from snapshot_tool.base.phases import Phase
from snapshot_tool.base.recipes import FIXED_CASES, NamedRecipe
from snapshot_tool.base.tolerance import DEFAULT_TOLERANCES
from tests.conftest import CHECKOUT, CHECKPOINT

pytestmark = pytest.mark.live

NEW_TOKENS = 20


@dataclass(frozen=True, slots=True)
class Pair:
    """Both implementations of the embedded checkpoint."""

    processor: Any
    hf: Any
    fms: Any
    preprocessor: Any


@pytest.fixture(scope="module")
def pair() -> Pair:
    """Load Hugging Face's model, and FMS's by its own loading."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    sys.path.insert(0, str(CHECKOUT))
    from fms.models import get_model
    from fms.models.idefics3 import load_smolvlm_preprocessor

    hf = AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    fms = get_model(
        "hf_pretrained", variant=str(CHECKPOINT), device_type="cpu", data_type=torch.float32
    )
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    return Pair(processor, hf, fms.eval(), load_smolvlm_preprocessor(str(CHECKPOINT)))


@contextmanager
def ordered_positions(model: Any) -> Iterator[None]:
    """Make the vision encoder number its patches 0, 1, 2 …, as FMS and transformers 4.51.3 do."""
    embedding = model.model.vision_model.embeddings.position_embedding

    def number(_module: object, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        (ids,) = arguments
        return (torch.arange(ids.shape[-1]).expand_as(ids),)

    handle = embedding.register_forward_pre_hook(number)
    try:
        yield
    finally:
        handle.remove()


def inputs_of(pair: Pair, case: NamedRecipe) -> dict[str, torch.Tensor]:
    """Return the processor's output for a fixed case."""
    images = [render(image) for image in case.recipe.images]
    batch = pair.processor(text=case.recipe.prompt, images=images, return_tensors="pt")
    return {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}


def largest_excess(
    expected: torch.Tensor, actual: torch.Tensor, phase: Phase, images: int
) -> float:
    """Return the largest |actual - expected| in units of the phase's tolerance."""
    tolerance = DEFAULT_TOLERANCES[phase].for_images(images)
    allowed = tolerance.atol + tolerance.rtol * expected.abs()
    return float(((actual - expected).abs() / allowed).max())


def test_this_environment_has_both() -> None:
    """ibm-fms 1.13.1 requires transformers 4.57."""
    import transformers

    assert transformers.__version__.startswith("4.57.")


@pytest.mark.parametrize("case", FIXED_CASES, ids=lambda case: case.name)
def test_every_phase_agrees_when_positions_are_numbered_in_order(
    pair: Pair, case: NamedRecipe
) -> None:
    """Preprocessing, vision, connector, forward within tolerance; greedy tokens equal."""
    inputs = inputs_of(pair, case)
    pixels, images = inputs["pixel_values"], len(case.recipe.images)
    tiles = [pair.preprocessor.preprocess(render(i))["pixel_values"] for i in case.recipe.images]
    assert (torch.cat(tiles, dim=1) - pixels).abs().max() <= 1e-6
    with torch.inference_mode(), ordered_positions(pair.hf):
        features = pair.hf.model.vision_model(pixels[0]).last_hidden_state
        assert largest_excess(features, pair.fms.vision_tower(pixels[0])[0], Phase.VISION, 1) <= 1
        tokens = pair.hf.model.connector(features)
        connected = pair.fms.connector(features, H=8, W=8)
        assert largest_excess(tokens, connected, Phase.CONNECTOR, 1) <= 1
        expected = pair.hf(**inputs).logits[0, -1]
        actual = pair.fms(**inputs)[0, -1]
        assert largest_excess(expected, actual, Phase.FORWARD, images) <= 1
        ids = pair.hf.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        eos = pair.hf.generation_config.eos_token_id
        own = pair.fms.generate(**inputs, max_new_tokens=NEW_TOKENS, eos_token_id=eos)
    assert own.tolist() == ids.tolist()


def test_transformers_own_position_ids_are_off_by_one_in_float32(pair: Pair) -> None:
    """Without the numbering a correct port fails against 4.57."""
    pixels = inputs_of(pair, FIXED_CASES[0])["pixel_values"][0]
    seen: list[torch.Tensor] = []
    embedding = pair.hf.model.vision_model.embeddings.position_embedding
    handle = embedding.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    with torch.inference_mode():
        features = pair.hf.model.vision_model(pixels).last_hidden_state
        excess = largest_excess(features, pair.fms.vision_tower(pixels)[0], Phase.VISION, 1)
    handle.remove()
    assert seen[0][0, :4].tolist() == [0, 0, 1, 2]
    assert excess > 100
