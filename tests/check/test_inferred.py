"""Modules matched without names: FMS's real model, of which nothing is told but its modules."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from snapshot_tool.base.protocol import Candidate, CandidateRequest, CaseInputs
from snapshot_tool.candidates.fms.candidate import FmsCandidate, load_fms_candidate
from snapshot_tool.diagnose.localise import Observation, localise, observe
from snapshot_tool.goldens.find import open_checkpoint_of
from snapshot_tool.goldens.golden import Golden, open_golden
from snapshot_tool.taps.sketches import TapRecorder
from tests.check.test_faults import module_of, scaled_weights
from tests.conftest import CHECKOUT, ROOT, Snap

FAMILY_GOLDENS = ROOT / "tests" / "families" / "goldens"
CASE = "variant-04"  # the case with the fewest tiles
# The model as a whole, and the rotary module, which FMS does not call as a module.
LACKING = {"model", "model.text_model.rotary_emb"}
# It does nothing but call its projection, and FMS has the projection alone: inference pairs that.
WRAPPER = "model.connector.modality_projection"
# FMS's SigLIP and its part without a pooling head have the same features: inference takes SigLIP.
HEADLESS, OUTER = "vision_tower.base_model", "vision_tower"


@dataclass(frozen=True)
class Unnamed(Candidate):
    """FMS behind the candidate protocol, without the family's names."""

    fms: FmsCandidate

    def modules(self) -> torch.nn.Module:
        """Show the model."""
        model: torch.nn.Module = self.fms.model
        return model

    def forward(self, inputs: CaseInputs) -> torch.Tensor:
        """Run it."""
        logits: torch.Tensor = self.fms.forward(inputs)
        return logits


def look(candidate: object, golden: Golden, case: str) -> Observation:
    """Observe a candidate on a case."""
    inputs = golden.inputs(case)
    recorder = TapRecorder(golden.manifest.taps.seed, inputs.attention_mask)
    with torch.inference_mode():
        seen = observe(candidate, inputs, golden.taps(case), recorder)  # type: ignore[arg-type]
    assert seen is not None
    return seen


def holder(name: str) -> str:
    """Return the FMS module that a fused one's part is named after in the family's twins."""
    return name.partition("[")[0].removesuffix(".qkv_fused")


@pytest.mark.parametrize("case", [CASE, "variant-02", "variant-11"])
def test_inferred_names_are_the_familys_on_a_correct_port(
    golden: Golden, candidate: FmsCandidate, case: str
) -> None:
    """Every module that both name has the same partner, fused ones included, and by its values."""
    named = look(candidate, golden, case)
    inferred = look(Unnamed(candidate), golden, case)
    expected = {hf: fms for hf, fms in named.mapping.names.items() if hf in named.taps}
    assert expected.pop(WRAPPER, None) == expected.get(f"{WRAPPER}.proj")
    found = {hf: holder(name) for hf, name in inferred.mapping.names.items()}
    assert found == {hf: OUTER if fms == HEADLESS else fms for hf, fms in expected.items()}
    recorded = {tap.module for tap in golden.taps(case)}
    lacking = LACKING | ({WRAPPER} & recorded)
    assert recorded - inferred.mapping.names.keys() == lacking
    assert inferred.mapping.modules == len(recorded)
    assert inferred.mapping.confirmed == len(recorded) - len(lacking)


@pytest.mark.parametrize(
    ("family", "differing"),
    # FMS gives RoBERTa's embeddings no module of their own: the twin is their last module's.
    [("llama", set()), ("roberta", {"roberta.embeddings"})],
)
def test_inferred_names_are_those_of_other_families(family: str, differing: set[str]) -> None:
    """An unfused decoder with a padded prompt, and an encoder of other code: no module is wrong."""
    golden = open_golden(next((FAMILY_GOLDENS / f"local--{family}").glob("*/cpu-float32")))
    checkpoint = open_checkpoint_of(golden, None)
    config = golden.manifest.checkpoint.config
    request = CandidateRequest(checkpoint.folder, config, "cpu", "float32")
    fms = load_fms_candidate(request, fms_path=CHECKOUT)
    named = look(fms, golden, "left-padded")
    inferred = look(Unnamed(fms), golden, "left-padded")
    others = {
        hf: name
        for hf, name in named.mapping.names.items()
        if hf in named.taps and holder(inferred.mapping.names.get(hf, "")) != name
    }
    assert others.keys() == differing
    taps = golden.taps("left-padded")
    found = localise("left-padded", taps, inferred.taps, inferred.mapping.names)
    assert (found.first_bad, found.between) == (None, False)


def test_a_correct_port_without_names_has_no_wrong_module(
    golden: Golden, candidate: FmsCandidate
) -> None:
    """What the candidate lays out in another order counts as not compared, not as wrong."""
    seen = look(Unnamed(candidate), golden, CASE)
    found = localise(CASE, golden.taps(CASE), seen.taps, seen.mapping.names)
    assert (found.first_bad, found.between) == (None, False)
    assert WRAPPER in found.not_compared
    reordered = {m for m in found.not_compared if m not in LACKING | {WRAPPER}}
    assert {name.rpartition(".")[2] for name in reordered} == {"q_proj", "k_proj"}
    assert all("text_model" in name for name in reordered)


def test_the_module_of_a_wrong_weight_is_named_without_names(
    golden: Golden, candidate: FmsCandidate
) -> None:
    """Weights of every kind, each alone times 1.01: the first wrong module is the one with it."""
    named = {}
    for weight in scaled_weights(candidate, 1.01):
        seen = look(Unnamed(candidate), golden, CASE)
        found = localise(CASE, golden.taps(CASE), seen.taps, seen.mapping.names)
        named[weight] = holder(bad.candidate) if (bad := found.first_bad_module) else ""
    assert len(named) > 20
    assert {w: name for w, name in named.items() if name != module_of(w)} == {}


def test_check_says_that_modules_were_inferred_and_what_was_not_compared(snap: Snap) -> None:
    """With the module that has the fault, and the figures of the mapping."""
    run = snap(
        "check", "--candidate", "tests.candidates:UnnamedAndFaulty", "--case", CASE,
        "--phase", "vision", "--json", "-",
    )  # fmt: skip
    assert run.code == 1, run.err
    first = run.report["first_divergence"]
    assert first["module"] == "model.vision_model.encoder.layers.1.mlp.fc2"
    assert first["candidate_module"] == "vision_tower.base_model.encoder.layers.1.mlp.w2"
    mapping = run.report["module_mapping"]
    assert mapping["inferred"] is True
    # What runs after the fault is matched by its place alone.
    assert 20 < mapping["confirmed"] < mapping["matched"] < mapping["modules"]
    assert "model.text_model.rotary_emb" in mapping["not_compared"]


def test_check_says_that_modules_were_matched_by_name(snap: Snap) -> None:
    """And names those of the reference that FMS does not have, though nothing differs."""
    run = snap(
        "check", "--fms-path", CHECKOUT, "--case", "variant-02", "--phase", "forward", "--localise"
    )
    assert run.code == 0, run.err
    assert "modules matched by the family's names" in run.out
    assert "2 not compared: model.text_model.rotary_emb, model\n" in run.out
