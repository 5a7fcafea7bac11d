"""What can be asked about each case of a golden set."""

from __future__ import annotations

from collections.abc import Sequence

from snapshot_tool.core.phases import Phase
from snapshot_tool.core.questions import Subject
from snapshot_tool.families import family_of
from snapshot_tool.store import parts
from snapshot_tool.store.golden import Golden
from snapshot_tool.store.layout import phase_file


def find_subjects(golden: Golden, cases: Sequence[str]) -> dict[str, Subject]:
    """Return what can be asked about each of the cases, by name."""
    return {name: _subject(golden, name) for name in cases}


def _subject(golden: Golden, case: str) -> Subject:
    recorded = [p for p in golden.case(case).phases if phase_file(p) in golden.manifest.files]
    if Phase.VISION not in recorded:  # whose output feeds the connector
        recorded = [phase for phase in recorded if phase is not Phase.CONNECTOR]
    if golden.inputs(case).image_sizes is not None:  # images that are no rows of equal tiles
        recorded = [p for p in recorded if p not in (Phase.VISION, Phase.CONNECTOR)]
    generated = 0
    if Phase.GENERATE in recorded:
        generated = len(golden.tensor(case, Phase.GENERATE, parts.TOKEN_IDS))
    return Subject(case, frozenset(recorded), _cuts(golden, case), generated)


def _cuts(golden: Golden, case: str) -> dict[int, int]:
    """Return the tiles within each beginning of the prompt that does not cut a tile in two."""
    inputs = golden.inputs(case)
    ids = inputs.input_ids[0, parts.real_positions(inputs)]
    tiles = 0 if inputs.pixel_values is None else len(inputs.pixel_values)
    if tiles == 0:
        return dict.fromkeys(range(1, len(ids) + 1), 0)
    checkpoint = golden.manifest.checkpoint
    tile_id = int(checkpoint.config.get(family_of(checkpoint.family).tile_id_field, -1))
    before = ids.eq(tile_id).cumsum(0).tolist()
    each, left = divmod(before[-1], tiles)
    if each == 0 or left:
        # Not so many tokens for every tile: only the whole prompt is sure to be answered.
        return {len(ids): tiles}
    return {
        length: tokens // each
        for length, tokens in enumerate(before, start=1)
        if tokens % each == 0
    }
