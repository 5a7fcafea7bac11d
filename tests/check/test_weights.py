"""The weights that FMS loaded, beside the checkpoint's: what no case uses is judged, too."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from snapshot_tool.base.protocol import PHASES, CandidateRequest, Phase
from snapshot_tool.candidates.fms.candidate import FmsCandidate, load_fms_candidate
from snapshot_tool.check.request import CheckRequest
from snapshot_tool.check.session import Session
from snapshot_tool.explore.questions import Prefix
from snapshot_tool.explore.recorded import Prompt
from snapshot_tool.goldens.golden import open_golden
from snapshot_tool.numerics.compare import compare_weights
from tests.candidates import CHECKOUT
from tests.conftest import CHECKPOINT, GOLDENS, Snap, set_folder
from tests.mutants.corpus import edit_of
from tests.mutants.mutant import plant

EMBEDDING = "text_model.base_model.embedding.weight"
DOUBLED = "tests.check.wrong_weights:unused_embedding_doubled"
# Query, key and value are one weight, gate and up another: so FMS has them by default.
FUSED = 69


def load(dtype: str = "float32") -> FmsCandidate:
    """Load the checkout's model."""
    config = open_golden(set_folder(GOLDENS)).manifest.checkpoint.config
    return load_fms_candidate(CandidateRequest(CHECKPOINT, config, "cpu", dtype), fms_path=CHECKOUT)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_weights_of_a_sound_port_are_the_checkpoints(dtype: str) -> None:
    """In whichever dtype it was loaded, fused as FMS has them."""
    report = compare_weights(load(dtype).weights())
    assert (report.compared, report.differing, report.not_compared) == (FUSED, (), ())


def test_weights_taken_apart_in_memory_are_compared_as_well() -> None:
    """FMS's unfusing changes names, not numbers; a fault in a part is found in the whole."""
    candidate = load()  # before FMS is imported from elsewhere
    from fms.utils.fusion import apply_unfuse_weights

    apply_unfuse_weights(candidate.model)
    report = compare_weights(candidate.weights())
    assert (report.compared, report.differing, report.not_compared) == (FUSED, (), ())
    key = candidate.model.text_model.base_model.layers[1].attn.in_proj.key
    with torch.no_grad():
        key.weight[0, 0] += 1
    (found,) = compare_weights(candidate.weights()).differing
    assert found.name == "text_model.base_model.layers.1.attn.in_proj.qkv_fused.weight"
    assert found.modules == tuple(
        f"model.text_model.layers.1.self_attn.{part}_proj" for part in "qkv"
    )
    assert found.mismatched == 1


def test_a_weight_that_no_case_uses_fails_the_check(snap: Snap, tmp_path: Path) -> None:
    """Every answer is right; the verdict, the exit code and every report name the weight."""
    record = tmp_path / "run.json"
    run = snap(
        *("check", "--candidate", DOUBLED, "--case", "variant-02"),
        *("--json", record, "--html", tmp_path / "run.html"),
    )
    assert run.code == 1
    assert f"FAIL weights / {EMBEDDING} (model.text_model.embed_tokens): 96 of" in run.out
    assert "weights that differ from the checkpoint: 1" in run.out
    report = json.loads(record.read_text(encoding="utf-8"))
    assert report["verdict"] == "fail"
    assert report["first_divergence"] is None
    (found,) = report["weights"]["differing"]
    assert (found["name"], found["modules"]) == (EMBEDDING, ["model.text_model.embed_tokens"])
    assert {result["verdict"] for result in report["results"]} <= {"pass", "skip"}
    assert EMBEDDING in (tmp_path / "run.html").read_text(encoding="utf-8")
    again = snap("report", record)
    assert again.code == 1
    assert f"FAIL weights / {EMBEDDING}" in again.out


def test_a_weight_that_the_checkpoint_leaves_unset_is_named_by_the_phase_that_uses_it(
    snap: Snap, tmp_path: Path
) -> None:
    """A bias of the connector that the checkpoint lacks: its NaN is traced back to it."""
    plant(edit_of("projection-with-bias"), checkout=CHECKOUT, out=tmp_path / "checkout")
    record = tmp_path / "run.json"
    run = snap(
        *("check", "--fms-path", tmp_path / "checkout", "--case", "variant-04"),
        *("--json", record),
    )
    assert run.code == 1
    assert "weights       unset, and used: connector.proj.bias" in run.out
    report = json.loads(record.read_text(encoding="utf-8"))
    first = report["first_divergence"]
    assert (first["phase"], first["module"]) == (
        "connector",
        "model.connector.modality_projection.proj",
    )
    source = "NaN comes from connector.proj.bias, which the checkpoint leaves unset"
    failed = [r for r in report["results"] if r["verdict"] == "fail" and r["phase"] == "connector"]
    assert failed
    assert all(source in result["reason"] for result in failed)
    assert report["weights"]["harmful"] == ["connector.proj.bias"]


def test_weights_that_are_unset_and_unused_are_listed_and_pass(snap: Snap) -> None:
    """The pooling head of FMS's SigLIP, whose answer idefics3 does not take."""
    run = snap("check", "--fms-path", CHECKOUT, "--case", "variant-04", "--json", "-")
    assert run.code == 0
    unset = run.report["weights"]["unset"]
    assert unset
    assert all(name.startswith("vision_tower.head.") for name in unset)
    assert run.report["weights"]["harmful"] == []


def test_weights_are_read_only_where_a_model_is_asked_for() -> None:
    """Preprocessing has none, and a replayed question is all that is asked."""
    golden, candidate = open_golden(set_folder(GOLDENS)), load()

    def compared(**wanted: object) -> bool:
        request = dataclasses.replace(CheckRequest(GOLDENS), **wanted)  # type: ignore[arg-type]
        return Session(request, golden, candidate).compare_weights() is not None

    assert compared(phase=PHASES)
    assert compared(phase=(Phase.CONNECTOR,))
    assert not compared(phase=(Phase.PREPROCESSING,))
    assert not compared(replay=(str(Prefix(Prompt("one-image", 3))),))
