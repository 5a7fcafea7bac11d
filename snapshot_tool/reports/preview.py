"""Previews of a golden set's cases: prompts, small images, generated texts."""

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

_SIDE = 192  # pixels, so that a report with many cases stays small


@dataclass(frozen=True, slots=True)
class Picture:
    """A small version of an image as a data: address, with the original size in pixels."""

    data: str
    width: int
    height: int
    caption: str


@dataclass(frozen=True, slots=True)
class CasePreview:
    """A case for a page.

    text: the tokenizer's input, before image placeholders were expanded. generated: the reference's
    new tokens as text. tokens: the length of the prompt. tiles: those of all images.
    """

    text: str
    generated: str
    tokens: int
    tiles: int
    pictures: tuple[Picture, ...]


def find_previews(report: CheckReport, goldens: Path) -> Mapping[str, CasePreview]:
    """Return previews of a check's cases by name, from its golden set.

    Raises GoldenNotFound if the set, or its version, is not in the folder.
    """
    # This imports torch, which a page without previews does not need.
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
        manifest, version = found.manifest, identity.golden_version
        if manifest and selection.matches(manifest) and manifest.golden_version == version:
            return found.folder
    raise GoldenNotFound(
        f"{goldens} does not have the golden set of the check, {identity}",
        "pass its folder: --goldens DIR",
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
