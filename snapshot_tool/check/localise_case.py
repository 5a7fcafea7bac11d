"""Looking into a candidate on one case: run it, and name the module in which it goes wrong."""

from __future__ import annotations

from dataclasses import replace

from snapshot_tool.base.localisation import Localisation
from snapshot_tool.base.protocol import Candidate
from snapshot_tool.base.tap import Sketchbook, shapes_of
from snapshot_tool.diagnose.localise import localise
from snapshot_tool.diagnose.observation import observe
from snapshot_tool.goldens.golden import Golden
from snapshot_tool.goldens.oracle import tap_limits


def localise_case(
    candidate: Candidate, golden: Golden, case: str, *, dtype: str
) -> Localisation | None:
    """Return what the modules say; None where the set or the candidate shows none.

    dtype: what the candidate computes in, by which the oracle's limits are chosen.
    """
    import torch

    golden_taps = golden.taps(case)
    if not golden_taps:
        return None
    limits = tap_limits(golden, case, dtype=dtype)
    inputs = golden.inputs(case)
    book = Sketchbook(golden.manifest.taps.seed, inputs.attention_mask, shapes_of(golden_taps))
    try:
        with torch.inference_mode():
            seen = observe(candidate, inputs, golden_taps, book)
    except Exception:  # what raises here has raised in its phase, and stands in the results
        if not callable(getattr(candidate, "observe_forward", None)):
            return None
        unfinished = book.unfinished()
        return localise(
            case, golden_taps, book.by_module(), {}, unfinished=unfinished, limits=limits
        )
    if seen is None:
        return None
    found = localise(case, golden_taps, seen.taps, seen.mapping.names, limits=limits)
    return replace(found, mapping=seen.mapping)
