"""The FMS checkout's own preprocessor beside Hugging Face's own, on images of every kind."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from snapshot_tool.base.recipes import IMAGE_KINDS, IMAGE_MODES, ImageRecipe
from snapshot_tool.goldens.images import render
from tests.conftest import CHECKPOINT, ROOT

pytestmark = pytest.mark.record

SIDES = (1, 2, 3, 4, 5, 17, 31, 32, 33, 64, 100, 129, 300)
SOURCE = ROOT / "tests/fms_checkout/overlay/fms/models/idefics3_components/own_preprocessing.py"


def load_port() -> Any:
    """Load the preprocessor's module by itself: it needs no FMS."""
    spec = importlib.util.spec_from_file_location("own_preprocessing", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def answer(process: Any) -> torch.Tensor | None:
    """Return pixel values, or None if the image is refused."""
    try:
        return torch.as_tensor(process())
    except (ValueError, TypeError):
        return None


@pytest.mark.parametrize("splitting", [True, False], ids=["tiles", "whole"])
@pytest.mark.parametrize("mode", IMAGE_MODES)
def test_the_preprocessor_is_bit_for_bit_hugging_faces(mode: str, *, splitting: bool) -> None:
    """From one pixel up, extreme aspect ratios too; and it refuses what Hugging Face refuses."""
    from transformers import AutoImageProcessor

    reference = AutoImageProcessor.from_pretrained(CHECKPOINT, local_files_only=True)
    reference.do_image_splitting = splitting
    config = json.loads((CHECKPOINT / "preprocessor_config.json").read_text(encoding="utf-8"))
    port = load_port().Idefics3ImagePreprocessor({**config, "do_image_splitting": splitting})
    state = np.random.RandomState(11)
    equal = 0
    for seed in range(40):
        width, height = (int(side) for side in state.choice(SIDES, size=2))
        kind = IMAGE_KINDS[seed % len(IMAGE_KINDS)]
        image: Image.Image = render(ImageRecipe(kind, width, height, mode, seed))
        expected = answer(lambda i=image: reference(i, return_tensors="np")["pixel_values"])
        actual = answer(lambda i=image: port.preprocess(i)["pixel_values"])
        assert (expected is None) == (actual is None), (width, height)
        if expected is not None and actual is not None:
            assert torch.equal(expected, actual), (width, height)
            equal += 1
    # Two channels cannot be told from rows: Hugging Face takes such images by accident alone.
    assert equal >= (5 if mode == "LA" else 25)
