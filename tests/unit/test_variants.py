"""Drawing variants: the same everywhere, and without a trace in the user's own hypothesis."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import configuration

from snapshot_tool.base.recipes import IMAGE_MODES, CaseRecipe
from snapshot_tool.record.variants import draw_recipe

# How many images each theme may have.
IMAGES = ({1}, {0}, {2}, {1}, {1}, {3}, {1}, {0, 1}, {0, 1}, {1}, {0}, {2, 3})
DRAW = """
import msgspec
from snapshot_tool.record.variants import draw_recipe
drawn = [draw_recipe(seed=9, index=i, attempt=i % 2) for i in (11, 7, 5, 1, 0)]
print(msgspec.json.encode(drawn).decode())
"""


def test_a_variant_does_not_depend_on_what_was_drawn_before_it(tmp_path: Path) -> None:
    """Seed, index and attempt alone decide, in any order and in a process of its own."""
    forward = [draw_recipe(seed=9, index=i, attempt=i % 2) for i in (0, 1, 5, 7, 11)]
    answer = subprocess.run(
        [sys.executable, "-c", DRAW], cwd=tmp_path, capture_output=True, check=True
    )
    assert msgspec.json.decode(answer.stdout, type=list[CaseRecipe]) == forward[::-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seed", [0, 7, 42, 123456])
def test_a_dozen_variants_cover_what_ports_get_wrong(seed: int) -> None:
    """Whatever the seed: padding, numbers of images, chat, unicode, lengths, sizes, modes."""
    drawn = [draw_recipe(seed=seed, index=index, attempt=0) for index in range(12)]
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


@pytest.mark.parametrize("index", range(12))
def test_attempts_at_a_variant_keep_its_theme(index: int) -> None:
    """When the reference refuses a draw, another one of the same theme takes its place."""
    drawn = [draw_recipe(seed=5, index=index, attempt=attempt) for attempt in range(4)]
    assert {len(recipe.images) for recipe in drawn} <= IMAGES[index]
    padded = [recipe.left_padding > 0 for recipe in drawn]
    assert padded == [index in (0, 10)] * 4
    if index == 6:
        assert all(min(i.width, i.height) <= 5 for recipe in drawn for i in recipe.images)
    if index == 9:
        assert all(i.mode != "RGB" for recipe in drawn for i in recipe.images)


def test_after_a_refusal_one_image_after_the_other_is_dealt_rgb() -> None:
    """A mode that the reference refuses does not keep the others away; in the end all are RGB."""
    modes = [[i.mode for i in draw_recipe(seed=3, index=5, attempt=a).images] for a in range(8)]
    first = modes[0]
    assert "RGB" not in first
    assert len(set(first)) == 3
    assert modes[1] == ["RGB", *first[1:]]
    assert modes[2] == [first[0], "RGB", first[2]]
    assert modes[7] == ["RGB"] * 3


def test_another_seed_deals_other_modes_to_the_same_themes() -> None:
    """So do the variants after a dozen."""
    dealt = {draw_recipe(seed=seed, index=0, attempt=0).images[0].mode for seed in range(7)}
    assert dealt == set(IMAGE_MODES)
    first, thirteenth = (draw_recipe(seed=5, index=i, attempt=0).images[0].mode for i in (0, 12))
    assert first != thirteenth


def test_variants_beyond_a_dozen_begin_the_themes_again_with_other_draws() -> None:
    """Forty variants are forty recipes."""
    first, thirteenth = (draw_recipe(seed=5, index=index, attempt=0) for index in (0, 12))
    assert len(thirteenth.images) == len(first.images) == 1
    assert thirteenth.left_padding > 0
    assert first != thirteenth


@pytest.mark.parametrize("home", [None, "mine"])
def test_the_users_own_hypothesis_home_is_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str | None
) -> None:
    """A home that was set stays set and unused; one that was not is not set."""
    name = "__hypothesis_home_directory"
    monkeypatch.setitem(vars(configuration), name, tmp_path / home if home else None)
    before = vars(configuration)[name]
    monkeypatch.chdir(tmp_path)
    draw_recipe(seed=1, index=0, attempt=0)
    assert vars(configuration)[name] == before
    assert list(tmp_path.iterdir()) == []
