"""Compact golden sets: every command works with them, or its error says why not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from snapshot_tool.base.errors import GoldenDamaged, GoldenNotFound
from snapshot_tool.base.protocol import Phase
from snapshot_tool.goldens.golden import Golden, connector_input, open_golden, recorded
from snapshot_tool.goldens.layout import INPUTS
from snapshot_tool.goldens.manifest import load_manifest
from snapshot_tool.goldens.tensors import describe_file
from snapshot_tool.goldens.verify import set_file
from tests.conftest import CHECKOUT, GOLDENS, ROOT, Run, Snap, error_lines, set_folder
from tests.unit.factory import write_manifest

COMPACT = ROOT / "tests" / "compact-goldens"
VISION = "last_hidden_state"


def check(snap: Snap, *options: object) -> Run:
    """Check the checkout against the compact set."""
    return snap("check", "--goldens", COMPACT, "--fms-path", CHECKOUT, *options)


def test_a_correct_port_passes_also_the_derived_questions(snap: Snap) -> None:
    """About tiles in any order, too: each has a record of its own."""
    run = check(snap, "--explore", "18", "--json", "-")
    assert run.code == 0, run.out
    asked = {kind["kind"]: kind["asked"] for kind in run.report["exploration"]["kinds"]}
    assert asked["tiles"] > 0 < asked["connector-tiles"]
    vision = [r["tensor"] for r in run.report["results"] if r["phase"] == "vision"]
    assert vision[:3] == [f"{VISION}.sample", f"{VISION}.moments", f"{VISION}.sums"]


@pytest.mark.parametrize(
    ("candidate", "phase"),
    [("OneBadTile", "vision"), ("NanInOnePlace", "vision"), ("ExchangesTwoTokens", "connector")],
)
def test_a_fault_in_one_place_fails_its_phase(snap: Snap, candidate: str, phase: str) -> None:
    """Whether or not the sample has that place."""
    spec = f"tests.check.compact_candidates:{candidate}"
    options = ("--case", "one-image", "--phase", phase, "--json", "-")
    run = snap("check", "--goldens", COMPACT, "--candidate", spec, *options)
    assert (run.code, run.report["verdict"]) == (1, "fail")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--tolerance", "oracle"), "has no oracle"),
        (("--graft", "model.connector"), "has no whole output of model.connector"),
    ],
)
def test_what_a_compact_set_lacks_is_named(
    snap: Snap, options: tuple[str, ...], problem: str
) -> None:
    """In two lines, with what to record."""
    run = check(snap, "--case", "one-image", *options)
    assert run.code == 3
    assert problem in error_lines(run)[0]


def test_show_verify_and_diff_work_with_both_storages(snap: Snap) -> None:
    """Against the full set of the same checkpoint: what both keep is equal, and the rest named."""
    assert "storage   compact" in snap("show", "--goldens", COMPACT).out
    assert snap("verify", "--goldens", COMPACT).code == 0
    run = snap("diff", set_folder(GOLDENS), set_folder(COMPACT))
    assert (
        "storage: full became compact; only tensors that both store in the same way are compared"
        in run.out
    )
    # The other one has no variants; of the fixed cases nothing moved.
    assert run.code == 1
    assert "/ one-image /" not in run.out


def test_inputs_are_those_of_the_full_set_bit_for_bit() -> None:
    """Pixel values, masks and images come out of their PNGs as the processor made them."""
    full, small = open_golden(set_folder(GOLDENS)), open_golden(set_folder(COMPACT))
    for case in (entry.name for entry in small.manifest.cases):
        one, other = full.inputs(case), small.inputs(case)
        for name in ("input_ids", "attention_mask", "pixel_values", "pixel_attention_mask"):
            assert torch.equal(getattr(one, name), getattr(other, name))
        for image, same in zip(full.images(case), small.images(case), strict=True):
            assert (image.mode, image.tobytes()) == (same.mode, same.tobytes())
    with pytest.raises(GoldenNotFound, match="is compact: it does not keep last_hidden_state"):
        small.tensor("one-image", Phase.VISION, VISION)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Copy the compact set, to be spoilt; return its folder."""
    shutil.copytree(COMPACT, tmp_path / "goldens", ignore=shutil.ignore_patterns(".snap"))
    return set_folder(tmp_path / "goldens")


def spoil(folder: Path, file: str, name: str, value: torch.Tensor) -> None:
    """Put another tensor in the place of one of the first case, and sign for it."""
    path = set_file(folder, file)
    tensors = load_file(path)
    tensors[f"one-image/{name}"] = value
    save_file(tensors, path)
    manifest = load_manifest(folder)
    manifest.files[file] = describe_file(path)
    write_manifest(folder, manifest)


def read_all(golden: Golden, case: str) -> None:
    """Read what a check of vision and connector reads."""
    golden.inputs(case)
    recorded(golden, case, Phase.VISION, VISION)
    connector_input(golden, case, VISION)


@pytest.mark.parametrize(
    ("file", "name", "value"),
    [
        ("vision.safetensors", f"{VISION}.shape", torch.tensor([17, 2**40, 64])),
        ("vision.safetensors", f"{VISION}.shape", torch.tensor([18, 64, 64])),
        ("vision.safetensors", f"{VISION}.sums", torch.zeros(17, 3, dtype=torch.float64)),
        ("vision.safetensors", f"{VISION}.sample", torch.zeros(17, 1)),
        ("connector.safetensors", "input.shape", torch.tensor([2**20, 2**20, 64])),
        ("connector.safetensors", "input.rows", torch.zeros(64, 63)),
        ("connector.safetensors", "input.rows", torch.zeros(0, 64)),
        (INPUTS, "pixel_values.shape", torch.tensor([2**40, 3, 64, 64])),
        (INPUTS, "pixel_values.png", torch.zeros(9, dtype=torch.uint8)),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    copy: Path, file: str, name: str, value: torch.Tensor
) -> None:
    """Whatever shape they have."""
    spoil(copy, file, name, value)
    with pytest.raises(GoldenDamaged, match="one-image"):
        read_all(open_golden(copy), "one-image")


def test_a_part_of_another_kind_is_no_golden_set(copy: Path) -> None:
    """The manifest alone shows it."""
    spoil(copy, "vision.safetensors", f"{VISION}.moments", torch.zeros(17, 5))
    with pytest.raises(GoldenDamaged, match=f"{VISION}.moments as F32"):
        open_golden(copy)


def test_a_set_with_resized_cuts_of_an_older_snap_is_refused(copy: Path) -> None:
    """One line names the tensor and says what to do."""
    spoil(copy, INPUTS, "pixel_values.cuts", torch.tensor([[128, 128, 4, 4]]))
    with pytest.raises(GoldenDamaged, match=r"pixel_values.cuts, no longer supported: record"):
        open_golden(copy)
