"""The right port passes in every dtype, recorded or computed, by every rule; a wrong one fails."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import CHECKOUT, CHECKPOINT, Snap
from tests.mutants.corpus import edit_of
from tests.mutants.mutant import plant
from tests.record.checkpoints import LLAMA, Notes, record_here

pytestmark = pytest.mark.record

Recorded = Callable[[str, Path], Path]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """Return a function that records a checkpoint in a dtype, once, with a float64 reference."""
    folder = tmp_path_factory.mktemp("dtypes")

    def record(dtype: str, checkpoint: Path) -> Path:
        goldens = folder / f"{dtype}-{checkpoint.name}"
        if not goldens.exists():
            variants = 0 if checkpoint == CHECKPOINT else 1
            options: dict[str, Any] = {"dtype": dtype, "variants": variants, "max_new_tokens": 6}
            record_here(checkpoint, goldens, oracle=True, **options)
        return goldens

    return record


def check(snap: Snap, goldens: Path, *options: object, fms: Path = CHECKOUT) -> Any:
    """Check a port; return its report."""
    checkpoint = CHECKPOINT if "idefics3" in goldens.name else LLAMA
    given = ("--goldens", goldens, "--checkpoint", checkpoint, "--fms-path", fms)
    return json.loads(snap("check", *given, *options, "--json", "-").out)


@pytest.mark.parametrize(
    ("dtype", "computed"),
    [
        ("float32", "bfloat16"),
        ("float32", "float16"),
        ("bfloat16", "bfloat16"),
        ("bfloat16", "float32"),
        ("float16", "float16"),
    ],
)
def test_the_right_port_passes_and_answers_derived_questions(
    snap: Snap, recorded: Recorded, dtype: str, computed: str
) -> None:
    """Whatever the golden was recorded in, and whatever the port computes in."""
    report = check(snap, recorded(dtype, LLAMA), "--dtype", computed, "--explore", 40)
    assert report["verdict"] == "pass"
    assert report["exploration"]["asked"] >= 30


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("float16", ()),
        ("bfloat16", ("--quick",)),
        ("bfloat16", ("--repeat", 2)),
    ],
)
def test_the_right_port_with_images_passes_in_half_precision(
    snap: Snap, recorded: Recorded, dtype: str, options: tuple[object, ...]
) -> None:
    """Features and image tokens that equal the golden bit for bit were computed, and pass."""
    report = check(snap, recorded(dtype, CHECKPOINT), "--explore", 20, *options)
    assert report["verdict"] == "pass"
    assert not report["warnings"]
    assert {r["phase"] for r in report["results"]} >= {"vision", "connector", "forward", "generate"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_wrong_port_fails_in_half_precision(
    snap: Snap, recorded: Recorded, tmp_path: Path, dtype: str
) -> None:
    """With one attention head of the vision encoder dropped."""
    plant(edit_of("vision-head-dropped"), checkout=CHECKOUT, out=tmp_path / "fms")
    report = check(snap, recorded(dtype, CHECKPOINT), fms=tmp_path / "fms")
    assert report["verdict"] == "fail"
    assert report["first_divergence"]["phase"] == "vision"


def test_the_table_does_not_judge_half_precision(snap: Snap, recorded: Recorded) -> None:
    """It is made for float32: with tolerances of the user's own it does."""
    given = ("--goldens", recorded("bfloat16", LLAMA), "--checkpoint", LLAMA)
    refused = snap("check", *given, "--fms-path", CHECKOUT, "--tolerance", "table")
    assert refused.code == 2
    options = ("--tolerance", "table", "--atol", 1, "--rtol", 1, "--phase", "forward")
    report = check(snap, recorded("bfloat16", LLAMA), *options)
    assert report["verdict"] == "pass"


def test_an_oracle_that_is_too_coarse_for_float32_is_refused(
    snap: Snap, recorded: Recorded, tmp_path: Path
) -> None:
    """As those of older half-precision sets are: three digits of a large difference."""
    goldens = tmp_path / "goldens-llama"
    shutil.copytree(recorded("bfloat16", LLAMA), goldens)
    spoil_deltas(goldens)
    given = ("--goldens", goldens, "--checkpoint", LLAMA, "--fms-path", CHECKOUT)
    assert snap("check", *given, "--dtype", "float32").code == 3
    assert snap("check", *given).code == 0


def test_the_golden_in_the_candidates_dtype_comes_first(
    snap: Snap, recorded: Recorded, tmp_path: Path
) -> None:
    """Else the float32 one; half precision is judged by the float64 reference."""
    for dtype in ("float32", "bfloat16"):
        shutil.copytree(recorded(dtype, LLAMA), tmp_path / "goldens", dirs_exist_ok=True)
    for dtype, own in (("float32",) * 2, ("bfloat16",) * 2, ("float16", "float32")):
        report = check(snap, tmp_path / "goldens", "--allow-near-ties", "--dtype", dtype)
        assert report["verdict"] == "pass"
        assert report["golden"]["dtype"] == own
        forward = [r for r in report["results"] if r["phase"] == "forward"]
        # Beyond what the table of float32 allows.
        assert any(r["max_abs"] > 5e-4 for r in forward) == (dtype != "float32")


@pytest.mark.parametrize(("oracle", "notes"), [(False, 1), (True, 0)])
def test_a_half_precision_set_without_an_oracle_is_noted(
    tmp_path: Path, *, oracle: bool, notes: int
) -> None:
    """A check could not judge it."""
    progress = Notes()
    record_here(
        LLAMA,
        tmp_path / "goldens",
        notes=progress,
        dtype="bfloat16",
        variants=0,
        max_new_tokens=1,
        oracle=oracle,
    )
    assert len([line for line in progress.lines if "oracle" in line]) == notes


def spoil_deltas(goldens: Path) -> None:
    """Round the distances to the oracle to bfloat16, and describe the file anew."""
    import msgspec
    import torch
    from safetensors.torch import load_file, save_file

    from snapshot_tool.goldens.layout import MANIFEST, ORACLE
    from snapshot_tool.goldens.manifest import encode, load_manifest
    from snapshot_tool.goldens.tensors import describe_file

    (manifest_path,) = goldens.glob(f"*/*/*/{MANIFEST}")
    path = manifest_path.parent / ORACLE
    rounded = {
        name: tensor.to(torch.bfloat16) if name.endswith(".delta") else tensor
        for name, tensor in load_file(path).items()
    }
    save_file(rounded, path)
    manifest = load_manifest(manifest_path.parent)
    files = {**manifest.files, ORACLE: describe_file(path)}
    manifest_path.write_bytes(encode(msgspec.structs.replace(manifest, files=files)))
