"""What can be asked about each case of a golden set."""

from __future__ import annotations

from collections.abc import Sequence

from snapshot_tool.base.phases import Phase
from snapshot_tool.base.protocol import CaseInputs
from snapshot_tool.base.questions import Subject
from snapshot_tool.families import family_of
from snapshot_tool.families.family import PADDING, UNSEEN, Family
from snapshot_tool.goldens import parts
from snapshot_tool.goldens.compact import recorded_shape
from snapshot_tool.goldens.golden import Golden
from snapshot_tool.goldens.layout import phase_file


def find_subjects(golden: Golden, cases: Sequence[str]) -> dict[str, Subject]:
    """Return what can be asked about each of the cases, by name."""
    family = family_of(golden.manifest.checkpoint.family)
    return {name: _subject(golden, name, family) for name in cases}


def _subject(golden: Golden, case: str, family: Family) -> Subject:
    inputs = golden.text(case)
    tiles = next(iter(golden.image_input_shape(case, "pixel_values")), 0)
    phases = set()
    padded = not bool(inputs.attention_mask.all())
    recurrent = family.recurrent and golden.manifest.environment.get(PADDING) != UNSEEN
    if family.generates and not (recurrent and padded):
        phases |= {Phase.FORWARD, Phase.GENERATE} & _recorded(golden, case)
    # An encoder's positions depend on padding before them, and its answers on token types.
    if _is_text_encoder(family) and not padded and inputs.token_type_ids is None:
        phases |= {Phase.FORWARD} & _recorded(golden, case)
    if golden.case(case).eos_token_ids is not None:
        # Questions about a generation have one set of end tokens for all cases.
        phases.discard(Phase.GENERATE)
    if tiles and _has_tiles_apart(golden, case, family, tiles):
        phases |= {Phase.VISION, Phase.CONNECTOR} & _recorded(golden, case)
    generated = 0
    if Phase.GENERATE in phases:
        generated = len(golden.tensor(case, Phase.GENERATE, parts.TOKEN_IDS))
    tile_id = golden.manifest.checkpoint.config.get(family.tile_id_field)
    if not _is_text_encoder(family):
        cuts = _cuts(inputs, tiles, tile_id if isinstance(tile_id, int) else -1)
    else:  # every token of an encoder sees all others: its prompts have no beginnings
        cuts = {inputs.input_ids.shape[1]: 0}
    return Subject(case, frozenset(phases), cuts, generated, paddable=not recurrent)


def _is_text_encoder(family: Family) -> bool:
    """Return whether a family takes text alone, and answers with logits of every position."""
    return family.logits and family.takes_text and not family.takes_images and not family.generates


def _recorded(golden: Golden, case: str) -> set[Phase]:
    return {p for p in golden.case(case).phases if phase_file(p) in golden.manifest.files}


def _has_tiles_apart(golden: Golden, case: str, family: Family, tiles: int) -> bool:
    """Tell whether vision and connector give each tile a row of its own, by the tile alone."""
    if golden.image_input_shape(case, "image_sizes"):
        return False
    phases = {Phase.VISION, Phase.CONNECTOR} & _recorded(golden, case)
    # The connector is fed with what was recorded of vision.
    return Phase.VISION in phases and all(
        recorded_shape(golden, case, phase, family.compared[phase])[:1] == (tiles,)
        for phase in phases
    )


def _cuts(inputs: CaseInputs, tiles: int, tile_id: int) -> dict[int, int]:
    """Return the tiles within each beginning of the prompt that does not cut a tile in two."""
    ids = inputs.input_ids[0, parts.real_positions(inputs)]
    if tiles == 0:
        return dict.fromkeys(range(1, len(ids) + 1), 0)
    before = ids.eq(tile_id).cumsum(0).tolist()
    each, left = divmod(before[-1] if before else 0, tiles)
    if each == 0 or left:
        # Not so many tokens for every tile (a vision encoder has no prompt at all): only the whole
        # of it is sure to be answered.
        return {len(ids): tiles}
    return {
        length: count // each for length, count in enumerate(before, start=1) if count % each == 0
    }
