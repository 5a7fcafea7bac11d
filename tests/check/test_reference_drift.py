"""A reference that drifts: its odd position ids are reported, and snap diff names the module."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from snapshot_tool.goldens.manifest import encode, load_manifest
from snapshot_tool.goldens.tensors import describe_file
from tests.conftest import CHECKOUT, GOLDENS, Snap, set_folder

CASE = "one-image"
MODULE = "model.vision_model.embeddings.position_embedding"


def rewrite(folder: Path, file: str, changes: dict[str, torch.Tensor]) -> None:
    """Put other tensors into a file of a set, and their digests into its manifest."""
    save_file({**load_file(folder / file), **changes}, folder / file)
    manifest = msgspec.to_builtins(load_manifest(folder))
    manifest["files"][file] = msgspec.to_builtins(describe_file(folder / file))
    (folder / "manifest.json").write_bytes(encode(manifest))


@pytest.fixture
def drifted(goldens_copy: Path) -> Path:
    """Make of the committed set one whose reference numbers patches 0, 0, 1, 2 …."""
    folder = set_folder(goldens_copy)
    vision, taps = (load_file(folder / f"{name}.safetensors") for name in ("vision", "taps"))
    ids = vision[f"{CASE}/position_ids"]
    odd = (torch.arange(ids.shape[-1]) - 1).clamp(min=0).expand_as(ids).contiguous()
    features = vision[f"{CASE}/last_hidden_state"] + 1
    moved = {f"{CASE}/position_ids": odd, f"{CASE}/last_hidden_state": features}
    rewrite(folder, "vision.safetensors", moved)
    modules = load_manifest(folder).taps.modules
    # What is wrong in it is wrong in all that contains it.
    wrong = [modules.index(name) for name in modules if f"{MODULE}.".startswith(f"{name}.")]
    rows = [taps[f"{CASE}/modules"].tolist().index(index) for index in wrong]
    sample = taps[f"{CASE}/output_sample"].clone()
    sample[rows] += 1
    rewrite(folder, "taps.safetensors", {f"{CASE}/output_sample": sample})
    return goldens_copy


def test_a_check_reports_that_the_references_own_position_ids_are_unusual(
    snap: Snap, drifted: Path
) -> None:
    """Vision fails, as it must, and the reason is the reference's; only there."""
    options = ("--phase", "vision", "--fms-path", CHECKOUT, "--json", "-")
    run = snap("check", "--goldens", drifted, *options)
    assert run.code == 1
    reasons = {r["case"]: r["reason"] for r in run.report["results"] if r["verdict"] == "fail"}
    assert list(reasons) == [CASE]
    assert reasons[CASE].startswith("the reference's own position ids are unusual (0, 1, 2, 3 exp")
    assert "transformers 4.51.3 used 0, 0, 1, 2)" in reasons[CASE]


def test_diff_names_the_module_in_which_two_references_part(snap: Snap, drifted: Path) -> None:
    """From the sketches of both sets alone; equal sets have no such lines."""
    run = snap("diff", set_folder(GOLDENS), set_folder(drifted))
    assert run.code == 1
    assert f"modules, case {CASE}: first wrong in {MODULE}" in run.out
    assert "vision / one-image / position_ids" in run.out
    same = snap("diff", set_folder(GOLDENS), set_folder(GOLDENS))
    assert (same.code, "modules" in same.out) == (0, False)
