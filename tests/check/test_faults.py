"""Faults in the port: each must be found, and in the phase that has it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from snapshot_tool.base.localisation import ERROR_LIMIT
from snapshot_tool.base.protocol import Phase
from snapshot_tool.base.results import first_divergence
from snapshot_tool.candidates.fms.candidate import FmsCandidate
from snapshot_tool.check.request import CheckRequest
from snapshot_tool.check.session import Session
from snapshot_tool.diagnose.localise import localise
from snapshot_tool.goldens.golden import Golden, tap_limits
from snapshot_tool.taps.sketches import TapRecorder, shapes_of
from tests.conftest import CHECKOUT, GOLDENS, Snap
from tests.mutants.corpus import MUTANTS, edit_of
from tests.mutants.mutant import plant

FEWEST_TILES = "variant-04"
# A weight whose error has sunk below the limit when the decoder ends.
FADING = "vision_tower.base_model.encoder.layers.2.layer_norm2.bias"


def test_a_fault_in_the_source_fails_the_check_and_is_named(snap: Snap, tmp_path: Path) -> None:
    """Exit 1, the phase and the module whose code was changed, and a checkout that is not clean."""
    mutant = MUTANTS["exact-gelu"]
    plant(edit_of(mutant.name), checkout=CHECKOUT, out=tmp_path / "checkout")
    options = ("--case", "one-image", "--json", "-")
    run = snap("check", "--fms-path", tmp_path / "checkout", *options)
    assert run.code == 1
    first = run.report["first_divergence"]
    assert (first["phase"], first["place"]) == (mutant.phase, mutant.places[0])
    assert first["module"] == mutant.places[0]
    assert run.report["environment"]["candidate"]["dirty"] is True


def owner(weight: str) -> Phase:
    """Return the phase that a weight belongs to."""
    parts = {"vision_tower": Phase.VISION, "connector": Phase.CONNECTOR}
    return parts.get(weight.partition(".")[0], Phase.FORWARD)


def scaled_weights(candidate: FmsCandidate, factor: float) -> Iterator[str]:
    """Scale each weight that the checkpoint has in turn, and put it back afterwards.

    One encoder layer and one decoder layer stand for all.
    """
    for name, weight in candidate.model.named_parameters():
        other_layer = ".layers." in name and ".layers.1." not in name
        if (other_layer and name != FADING) or name in candidate.unset_weights():
            continue
        before = weight.detach().clone()
        with torch.no_grad():
            weight.mul_(factor)
        try:
            yield name
        finally:
            with torch.no_grad():
                weight.copy_(before)


def test_any_weight_off_by_one_percent_is_found_in_its_phase(
    golden: Golden, candidate: FmsCandidate
) -> None:
    """Each weight alone, times 1.01, fails the phase that it belongs to first."""
    request = CheckRequest(GOLDENS, phase=tuple(Phase)[:4], case="one-image")
    checker = Session(request, golden, candidate)
    case = golden.case("one-image")
    found = {}
    for name in scaled_weights(candidate, 1.01):
        results = [r for phase in request.phases for r in checker.run(case, phase)]
        first = first_divergence(tuple(results))
        found[name] = first.phase if first else None
    assert len(found) > 20
    assert {name: phase for name, phase in found.items() if phase is not owner(name)} == {}


def module_of(weight: str) -> str:
    """Return the module whose output a weight of FMS's model shows in first."""
    name = weight.rpartition(".")[0]
    # Queries, keys and values come out of the projection that fuses them.
    return name.removesuffix(".qkv_fused")


def test_the_module_of_any_weight_off_by_a_thousandth_is_named(
    golden: Golden, candidate: FmsCandidate
) -> None:
    """Each weight alone, times 1.001: the module that holds it is the first wrong one."""
    inputs = golden.inputs(FEWEST_TILES)
    taps = golden.taps(FEWEST_TILES)
    shapes, limits = shapes_of(taps), tap_limits(golden, FEWEST_TILES, dtype="float32")
    named = {}
    for weight in scaled_weights(candidate, 1.001):
        recorder = TapRecorder(golden.manifest.taps.seed, inputs.attention_mask, shapes)
        with torch.inference_mode():
            names = candidate.observe_forward(inputs, recorder)
        found = localise(FEWEST_TILES, taps, recorder.by_module(), names, limits=limits)
        named[weight] = bad.candidate if (bad := found.first_bad_module) else ""
        assert not found.recovers
    assert {w: name for w, name in named.items() if name != module_of(w)} == {}


def test_no_module_of_a_correct_port_is_named(golden: Golden, candidate: FmsCandidate) -> None:
    """On any case, padded ones included, every module agrees with the reference."""
    for case in golden.manifest.cases:
        inputs = golden.inputs(case.name)
        taps = golden.taps(case.name)
        recorder = TapRecorder(golden.manifest.taps.seed, inputs.attention_mask, shapes_of(taps))
        with torch.inference_mode():
            names = candidate.observe_forward(inputs, recorder)
        found = localise(case.name, taps, recorder.by_module(), names)
        assert (found.first_bad, found.between) == (None, False)
        errors = [m.output_error for m in found.modules if m.output_error is not None]
        assert len(errors) >= 50
        assert max(errors) < ERROR_LIMIT / 10
        # What Hugging Face has and FMS does not: the model as a whole, and the rotary module.
        lacking = {m.module for m in found.modules if not m.candidate}
        assert lacking == {"model", "model.text_model.rotary_emb"}
