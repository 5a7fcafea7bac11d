"""`--graft`: the golden's output in one module's place proves that it is the only fault."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from snapshot_tool.base.report import Graft
from snapshot_tool.candidates.fms.candidate import FmsCandidate
from snapshot_tool.check.request import CheckRequest
from snapshot_tool.check.session import Session
from snapshot_tool.goldens.golden import Golden
from tests.conftest import CHECKOUT, GOLDENS, Snap, error_lines
from tests.mutants.corpus import edit_of
from tests.mutants.mutant import Edit, plant

CASE = "variant-04"  # the committed set keeps its outputs whole
TEXT = "text_model.base_model.layers"
VISION = "vision_tower.base_model.encoder.layers"
HF_TEXT, HF_VISION = "model.text_model.layers", "model.vision_model.encoder.layers"


@contextmanager
def weight_off(candidate: FmsCandidate, name: str) -> Iterator[None]:
    """Scale a weight by 1.01 meanwhile."""
    weight = dict(candidate.model.named_parameters())[name]
    before = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(1.01)
    try:
        yield
    finally:
        with torch.no_grad():
            weight.copy_(before)


def graft(candidate: FmsCandidate, golden: Golden, module: str) -> Graft:
    """Graft a module of the one case."""
    found = Session(CheckRequest(GOLDENS, graft=module), golden, candidate).graft(())
    assert found is not None
    assert found.case == CASE or module in ("model.vision_model", "model.connector")
    return found


@pytest.mark.parametrize(
    ("weight", "module"),
    [
        (f"{VISION}.0.layer_norm1.weight", f"{HF_VISION}.0.layer_norm1"),
        (f"{VISION}.1.attn.in_proj.qkv_fused.weight", f"{HF_VISION}.1.self_attn"),
        ("vision_tower.base_model.post_layernorm.weight", "model.vision_model"),
        ("connector.proj.weight", "model.connector"),
        (f"{TEXT}.2.attn.in_proj.qkv_fused.weight", f"{HF_TEXT}.2.self_attn"),
        (f"{TEXT}.3.ff_sub_layer.w2.weight", f"{HF_TEXT}.3.mlp.down_proj"),
        ("text_model.head.weight", "lm_head"),
    ],
)
def test_a_graft_of_the_faulty_module_proves_the_fault(
    candidate: FmsCandidate, golden: Golden, weight: str, module: str
) -> None:
    """Everything passes with it that did not without it."""
    with weight_off(candidate, weight):
        found = graft(candidate, golden, module)
    assert found.proved, found.conclusion
    assert found.conclusion.endswith("so it is the only fault")
    assert weight.startswith(found.candidate_module)


def test_parts_of_fused_modules_are_grafted_one_by_one(
    candidate: FmsCandidate, golden: Golden
) -> None:
    """FMS fuses query, key and value: with one put right, the next one is wrong."""
    with weight_off(candidate, f"{TEXT}.1.attn.in_proj.qkv_fused.weight"):
        one = graft(candidate, golden, f"{HF_TEXT}.1.self_attn.q_proj")
    assert not one.proved
    assert one.next_module == f"{HF_TEXT}.1.self_attn.k_proj"
    with weight_off(candidate, f"{TEXT}.1.ff_sub_layer.wg1_fused.weight"):
        gate = graft(candidate, golden, f"{HF_TEXT}.1.mlp.gate_proj")
    assert gate.next_module == f"{HF_TEXT}.1.mlp.up_proj"


def test_a_graft_elsewhere_proves_nothing_and_names_the_fault(
    candidate: FmsCandidate, golden: Golden
) -> None:
    """The faulty module is the first wrong one still; afterwards the model is as it was."""
    with weight_off(candidate, f"{TEXT}.2.ff_sub_layer.w2.weight"):
        found = graft(candidate, golden, f"{HF_TEXT}.0.mlp")
    assert not found.proved
    assert found.conclusion == (
        f"forward of case {CASE} still fails with it; first wrong is now {HF_TEXT}.2.mlp.down_proj"
    )
    right = graft(candidate, golden, f"{HF_TEXT}.0.mlp")
    assert "proves nothing" in right.conclusion


def test_the_report_says_what_a_graft_proved(snap: Snap, tmp_path: Path) -> None:
    """A wrong GELU in every layer: a graft of the first leaves the second; the encoder's is all."""
    plant(edit_of("exact-gelu"), checkout=CHECKOUT, out=tmp_path / "checkout")
    options = ("check", "--fms-path", tmp_path / "checkout", "--case", "one-image")
    first = f"{HF_VISION}.0.mlp.activation_fn"
    run = snap(*options, "--graft", first, "--json", "-")
    assert run.code == 1
    assert run.report["graft"]["proved"] is False
    assert run.report["graft"]["next_module"] == f"{HF_VISION}.1.mlp.activation_fn"
    text = snap(*options, "--graft", "model.vision_model")
    assert text.code == 1
    assert (
        "graft of model.vision_model: all phases of case one-image pass with it, so it is "
        "the only fault" in text.out
    )


def test_a_graft_that_cannot_be_made_says_why(snap: Snap) -> None:
    """No such module; none of its output kept; one that FMS lays out otherwise."""
    options = ("check", "--fms-path", CHECKOUT, "--case", CASE, "--graft")
    unknown = snap(*options, "model.nonsense")
    assert unknown.code == 2
    assert "the reference has no such module" in error_lines(unknown)[0]
    otherwise = snap(*options, "model.vision_model.embeddings.position_embedding")
    assert otherwise.code == 3
    assert "cannot graft model.vision_model.embeddings.position_embedding" in otherwise.err
    candidate = ("check", "--candidate", "tests.candidates:StopsEarly", "--case", CASE)
    assert snap(*candidate, "--graft", "lm_head").code == 2


@pytest.mark.parametrize(
    ("edit", "offered"),
    [
        (edit_of("exact-gelu"), True),
        (Edit("fms/models/siglip_vision.py", "probe = nn.Parameter(torch.randn(1, ",
              "probe = nn.Parameter(torch.randn(2, "), False),
    ],
)  # fmt: skip
def test_a_graft_is_proposed_after_a_difference_but_not_where_the_port_raises(
    snap: Snap, tmp_path: Path, edit: Edit, *, offered: bool
) -> None:
    """An exception has a place, and a graft would prove nothing about it."""
    plant(edit, checkout=CHECKOUT, out=tmp_path / "checkout")
    options = ("--fms-path", tmp_path / "checkout", "--case", "one-image", "--phase", "vision")
    run = snap("check", *options)
    assert run.code == 1
    assert ("--graft" in run.out) is offered
