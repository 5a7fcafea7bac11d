"""Recipes, the images drawn from them, and the variants that hypothesis draws."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from snapshot_tool.base.images import from_arrays, render, to_arrays
from snapshot_tool.base.recipes import (
    FIXED_CASES,
    IMAGE_KINDS,
    IMAGE_MODES,
    CaseRecipe,
    ImageRecipe,
)
from snapshot_tool.record.variants import draw_recipe

SEEDS = (0, 7, 42, 123456)


def variants(seed: int) -> list[CaseRecipe]:
    """Draw the twelve variants of a seed."""
    return [draw_recipe(seed=seed, index=index, attempt=0) for index in range(12)]


def test_the_fixed_cases_are_the_suites() -> None:
    """One image, and two of which the second is the first one's inverse."""
    one, two = FIXED_CASES
    assert (one.name, one.recipe.prompt) == ("one-image", "Describe the image: <image>.")
    assert (two.name, two.recipe.prompt) == ("two-images", "Compare: <image> then <image>.")
    gradient, inverse = (np.asarray(render(image)).astype(int) for image in two.recipe.images)
    assert gradient.shape == (512, 512, 3)
    assert gradient[0, 0].tolist() == [0, 0, 0]
    assert gradient[0, 511].tolist() == [255, 0, 127]
    assert gradient[511, 0].tolist() == [0, 255, 127]
    assert gradient[511, 511].tolist() == [255, 255, 255]
    assert (inverse == 255 - gradient).all()


@pytest.mark.parametrize("mode", IMAGE_MODES)
@pytest.mark.parametrize("kind", IMAGE_KINDS)
def test_an_image_survives_being_kept_as_arrays(kind: str, mode: str) -> None:
    """Pixels, mode, size and palette, from one pixel up; and drawing it again gives the same."""
    for width, height in ((1, 1), (7, 3), (40, 33)):
        recipe = ImageRecipe(kind, width, height, mode, seed=9)
        image = render(recipe)
        again = from_arrays(to_arrays(image), mode=mode)
        assert (again.mode, again.size) == (image.mode, image.size) == (mode, (width, height))
        assert np.array_equal(np.asarray(again), np.asarray(image))
        assert again.getpalette() == image.getpalette()
        assert again.convert("RGBA").tobytes() == image.convert("RGBA").tobytes()
        assert np.array_equal(np.asarray(render(recipe)), np.asarray(image))


@pytest.mark.parametrize(
    "arguments",
    [
        {"kind": "photo"},
        {"mode": "F"},
        {"width": 0},
        {"height": 10**6},
        {"seed": -1},
    ],
)
def test_a_recipe_that_cannot_be_drawn_is_refused(arguments: dict[str, object]) -> None:
    """A manifest from a stranger cannot ask for gigabytes."""
    fields: dict[str, object] = {"kind": "flat", "width": 4, "height": 4, **arguments}
    with pytest.raises(ValueError, match="image"):
        ImageRecipe(**fields)  # type: ignore[arg-type]


def test_a_prompt_and_its_images_must_belong_together() -> None:
    """One placeholder for each image."""
    with pytest.raises(ValueError, match="1 <image> in the prompt for 0 images"):
        CaseRecipe("<image>")


@pytest.mark.parametrize("seed", SEEDS)
def test_a_dozen_variants_cover_what_ports_get_wrong(seed: int) -> None:
    """Whatever the seed: padding, numbers of images, chat, unicode, lengths, sizes, modes."""
    drawn = variants(seed)
    assert {len(recipe.images) for recipe in drawn} == {0, 1, 2, 3}
    assert any(recipe.left_padding and recipe.images for recipe in drawn)
    assert any(recipe.left_padding and not recipe.images for recipe in drawn)
    assert any(recipe.chat for recipe in drawn)
    assert any(not recipe.prompt.isascii() for recipe in drawn)
    assert any(recipe.prompt.replace("<image>", "") == "" for recipe in drawn)
    assert any(len(recipe.prompt) > 200 for recipe in drawn)
    images = [image for recipe in drawn for image in recipe.images]
    assert any(min(image.width, image.height) <= 5 for image in images)
    early = {image.mode for recipe in drawn[:6] for image in recipe.images}
    assert early == set(IMAGE_MODES)


def test_another_seed_or_attempt_draws_another_variant() -> None:
    """Nothing is drawn twice."""
    prompts = [recipe.prompt for recipe in variants(1)]
    assert prompts != [recipe.prompt for recipe in variants(2)]
    first, second = (draw_recipe(seed=1, index=0, attempt=attempt) for attempt in (0, 1))
    assert first != second


def test_drawing_is_the_same_in_every_process_and_leaves_no_files(tmp_path: Path) -> None:
    """The seed alone decides; hypothesis's own folder stays out of the user's."""
    program = (
        "from snapshot_tool.record.variants import draw_recipe\n"
        "print([draw_recipe(seed=3, index=i, attempt=0) for i in range(12)])\n"
    )
    command = [sys.executable, "-c", program]
    answers = {
        subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert len(answers) == 1
    assert list(tmp_path.iterdir()) == []
