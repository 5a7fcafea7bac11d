"""Previews of a golden set's cases: prompts, small pictures, the reference's answers."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from snapshot_tool.base.errors import GoldenNotFound
from snapshot_tool.base.report import CheckReport, GoldenIdentity
from snapshot_tool.goldens.find import Selection, find_goldens
from snapshot_tool.goldens.manifest import case_recipe

if TYPE_CHECKING:
    from PIL import Image

    from snapshot_tool.goldens.golden import Golden

_SIDE = 192  # pixels: a report of dozens of cases stays small


@dataclass(frozen=True, slots=True)
class Picture:
    """An image as a page shows it.

    Args:
        data: a small version, as a data: address.
        width: of the image itself, in pixels.
        height: the same.
        caption: how it was drawn, and its mode.
    """

    data: str
    width: int
    height: int
    caption: str


@dataclass(frozen=True, slots=True)
class CasePreview:
    """A case as a page shows it.

    Args:
        text: the tokenizer's input, before image placeholders were expanded.
        generated: the reference's new tokens as text.
        tokens: length of the prompt.
        tiles: of all images.
        pictures: the images, in order.
    """

    text: str
    generated: str
    tokens: int
    tiles: int
    pictures: tuple[Picture, ...]


def find_previews(report: CheckReport, goldens: Path) -> Mapping[str, CasePreview]:
    """Return previews of a check's cases, by name, from the golden set that it was checked against.

    Raises GoldenNotFound if the set, or its version, is not in the folder.
    """
    # It imports torch, which a page without previews does not need.
    from snapshot_tool.goldens.golden import open_golden

    golden = open_golden(_find_folder(report.golden, goldens))
    names = {result.case for result in report.results}
    return {
        case.name: CasePreview(
            case.text, case.generated, case.tokens, case.tiles, tuple(_pictures(golden, case.name))
        )
        for case in golden.manifest.cases
        if case.name in names
    }


def _find_folder(identity: GoldenIdentity, goldens: Path) -> Path:
    selection = Selection(identity.checkpoint, identity.revision, identity.device, identity.dtype)
    for found in find_goldens(goldens):
        manifest = found.manifest
        if manifest is None or not selection.matches(manifest):
            continue
        if manifest.golden_version == identity.golden_version:
            return found.folder
    raise GoldenNotFound(
        f"{goldens} does not hold {identity}, which the run was checked against",
        "name the folder that does with --goldens",
    )


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
