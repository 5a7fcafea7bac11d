"""Telling a golden set's cases for people: prompts, small pictures, the reference's answers."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from snapshot_tool.base.preview import CaseStory, Picture
from snapshot_tool.goldens.golden import Golden
from snapshot_tool.goldens.manifest import case_recipe

if TYPE_CHECKING:
    from PIL import Image

_SIDE = 192  # pixels: a report of dozens of cases stays small


def tell_stories(golden: Golden, names: Iterable[str]) -> dict[str, CaseStory]:
    """Return the stories of those of the named cases that the golden set has."""
    wanted = set(names)
    return {
        case.name: CaseStory(
            case.text, case.generated, case.tokens, case.tiles, tuple(_pictures(golden, case.name))
        )
        for case in golden.manifest.cases
        if case.name in wanted
    }


def _pictures(golden: Golden, case: str) -> Iterator[Picture]:
    recipes = case_recipe(golden.case(case)).recipe.images
    for image, recipe in zip(golden.images(case), recipes, strict=True):
        yield Picture(_data(image), image.width, image.height, f"{recipe.kind}, {recipe.mode}")


def _data(image: Image.Image) -> str:
    """Return a small version as a data: address; WebP, since noise makes large PNGs."""
    small = image.convert("RGBA" if image.mode in ("RGBA", "LA", "P") else "RGB")
    small.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    small.save(buffer, format="WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
