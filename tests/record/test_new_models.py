"""Recording a model that no family declares: any decoder, and nothing that only looks like one."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.conftest import Run, Snap, error_lines, set_folder
from tests.families.record import builder
from tests.record.checkpoints import SMALL, copy_checkpoint, edit_json, manifest_of

pytestmark = pytest.mark.record

PAGE = "docs/adding-a-family.md"
DECODERS = {"phi3": True, "bloom": True, "gemma2": True, "rwkv": False}
OTHERS = ("xlm-roberta", "xlm-roberta-decoder")
FAMILY = """
from snapshot_tool.families import (Family, Phase)

PHI3 = Family("my_phi3", "Phi3ForCausalLM", (Phase.FORWARD, Phase.GENERATE))
"""
OWN_CLASS = """
from transformers import Phi3ForCausalLM

class OwnForCausalLM(Phi3ForCausalLM):
    pass
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the checkpoints."""
    out = tmp_path_factory.mktemp("new") / "checkpoints"
    builder().build_all(out, (*DECODERS, *OTHERS))
    return out


def record(snap: Snap, checkpoint: Path, goldens: Path, *options: object) -> Run:
    """Record a small set."""
    where = ("--checkpoint", checkpoint, "--goldens", goldens)
    return snap("record", *where, *SMALL, *options)


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_is_recorded_whatever_its_cache_and_positions(
    snap: Snap, checkpoints: Path, tmp_path: Path, name: str
) -> None:
    """Near its float64 reference; and whether padding changes logits, for derived questions."""
    run = record(snap, checkpoints / name, tmp_path, "--oracle")
    assert run.code == 0, run.err
    manifest = manifest_of(tmp_path)
    assert manifest["checkpoint"]["family"].endswith("ForCausalLM")
    assert {p for case in manifest["cases"] for p in case["phases"]} == {"forward", "generate"}
    assert ("padding" in manifest["environment"]) == DECODERS[name]
    assert len(manifest["taps"]["modules"]) > 10
    oracle = load_file(set_folder(tmp_path) / "oracle.safetensors")
    noise = [oracle[name] for name in oracle if name.endswith("generate.step_noise.float32")]
    assert len(noise) == len(manifest["cases"])
    assert max(float(steps.max()) for steps in noise) < 1e-3


def test_a_model_whose_tokens_see_later_ones_is_refused(
    snap: Snap, checkpoints: Path, tmp_path: Path
) -> None:
    """Its answers to derived questions would be others; as a decoder it is recorded."""
    folder = copy_checkpoint(checkpoints / "xlm-roberta-decoder", tmp_path / "decoder")
    run = record(snap, folder, tmp_path / "goldens")
    assert run.code == 3
    problem, remedy = error_lines(run)
    assert "is not causal" in problem
    assert "is_decoder" in remedy
    edit_json(folder / "config.json", is_decoder=True)
    assert record(snap, folder, tmp_path / "goldens").code == 0


def test_a_class_that_is_no_decoder_takes_a_declaration(
    snap: Snap, checkpoints: Path, tmp_path: Path
) -> None:
    """The error says how it is given, and where that is explained."""
    run = record(snap, checkpoints / "xlm-roberta", tmp_path)
    assert run.code == 2
    problem, remedy = error_lines(run)
    assert "XLMRobertaForMaskedLM" in problem
    assert "--family FILE.py" in remedy
    assert PAGE in remedy


def test_a_class_that_the_checkpoint_brings_is_recorded_if_trusted(
    snap: Snap, checkpoints: Path, tmp_path: Path
) -> None:
    """A model may be older than its release in transformers."""
    folder = copy_checkpoint(checkpoints / "phi3", tmp_path / "own")
    (folder / "modeling_own.py").write_text(OWN_CLASS, "utf-8")
    edit_json(
        folder / "config.json",
        architectures=["OwnForCausalLM"],
        auto_map={"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"},
    )
    careful = record(snap, folder, tmp_path / "goldens")
    assert careful.code == 3
    assert "--trust-remote-code" in error_lines(careful)[1]
    run = record(snap, folder, tmp_path / "goldens", "--trust-remote-code")
    assert run.code == 0, run.err
    assert manifest_of(tmp_path / "goldens")["checkpoint"]["family"] == "OwnForCausalLM"


def test_a_declaration_replaces_what_was_recorded_without_one(
    snap: Snap, checkpoints: Path, tmp_path: Path
) -> None:
    """The set names the family and the digest of its file; the same file again changes nothing."""
    file = tmp_path / "phi3.py"
    file.write_text(FAMILY, "utf-8")
    assert record(snap, checkpoints / "phi3", tmp_path / "g").code == 0
    again = ("--family", file, "--update", "--reason", "declared", "--yes")
    assert record(snap, checkpoints / "phi3", tmp_path / "g", *again).code == 0
    manifest = manifest_of(tmp_path / "g")
    assert manifest["golden_version"] == 2
    assert manifest["checkpoint"]["family"] == "my_phi3"
    assert len(manifest["environment"]["family_file"]) == 64
    assert record(snap, checkpoints / "phi3", tmp_path / "g", *again).out.startswith("unchanged")
