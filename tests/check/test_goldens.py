"""`snap list`, `show`, `verify`, `diff`, `doctor`, and what damaged golden sets do to `check`."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import pytest
import torch

from snapshot_tool.base.errors import CandidateUnavailable
from snapshot_tool.base.protocol import CandidateRequest, CaseInputs
from snapshot_tool.candidates.fms.candidate import FmsCandidate, load_fms_candidate
from snapshot_tool.goldens.manifest import load_manifest
from tests.conftest import (
    CHECKOUT,
    CHECKPOINT,
    GOLDENS,
    ROOT,
    Run,
    Snap,
    error_lines,
    set_folder,
)
from tests.unit.factory import flip_bit, truncate


def check_copy(snap: Snap, goldens: Path) -> Run:
    """Check the copied goldens."""
    return snap("check", "--fms-path", CHECKOUT, "--goldens", goldens, "--case", "one-image")


def test_the_committed_goldens_are_whole_and_small(snap: Snap) -> None:
    """They hold the two fixed cases and 12 variants in at most 21 MB."""
    verified = snap("verify")
    assert verified.code == 0
    assert verified.out.startswith("intact   local/tiny-idefics3 at ")
    listed = snap("list").out
    assert "cpu-float32" in listed
    assert "14 cases" in listed
    size = sum(path.stat().st_size for path in GOLDENS.rglob("*") if path.is_file())
    assert size < 21e6


def test_the_committed_goldens_come_from_the_pinned_stack(snap: Snap) -> None:
    """Versions, flags, seed and digests stand in the manifest."""
    manifest = json.loads(snap("show", "--json").out)
    environment = manifest["environment"]
    assert environment["transformers"] == "4.51.3"
    assert environment["huggingface_hub"] == "0.36.0"
    assert (environment["tf32"], environment["deterministic_algorithms"]) == ("false", "true")
    assert environment["attention"] == "sdpa"
    assert (manifest["seed"], manifest["draws"]["variants"]) == (42, 12)
    assert len(manifest["checkpoint"]["revision"]) == 64
    assert "model.safetensors" in manifest["checkpoint"]["files"]
    tensors = manifest["files"]["vision.safetensors"]["tensors"]
    assert tensors["one-image/last_hidden_state"]["shape"] == [17, 64, 64]


def test_show_tells_a_person_what_is_in_a_set(snap: Snap) -> None:
    """Origin, history, tolerances, and a line for each case."""
    out = snap("show", "tiny-idefics3").out
    assert "made with transformers 4.51.3, huggingface_hub 0.36.0, torch 2.13.0" in out
    assert "several images: atol 7e-05, rtol 7e-05" in out
    assert "'Describe the image: <image>.' -> ' a smooth gradient from black" in out
    assert "version 1 " in out


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (partial(flip_bit, byte=-3), "was altered: tensor "),
        (partial(truncate, size=-100), "has "),
        (Path.unlink, "is missing"),
    ],
    ids=["flipped bit", "truncated", "missing"],
)
def test_damage_is_found_and_named(
    snap: Snap, goldens_copy: Path, damage: Callable[[Path], None], named: str
) -> None:
    """By verify and by check, with the file. Unit tests damage each file of a set."""
    path = set_folder(goldens_copy) / "vision.safetensors"
    damage(path)
    verified = snap("verify", "--goldens", goldens_copy)
    assert verified.code == 3
    assert f"{path} {named}" in verified.out
    checked = check_copy(snap, goldens_copy)
    assert checked.code == 3
    problem, remedy = error_lines(checked)
    assert f"{path} {named}" in problem
    assert "restore it from version control" in remedy


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda text: text.replace('"schema_version": ', '"schema_version": 9'), "schema 9"),
        (lambda text: text[: len(text) // 2], "is not a valid manifest"),
        (lambda text: text.replace('"atol"', '"alot"'), "missing required field `atol`"),
        (lambda _text: "[" * 100_000, "is not a valid manifest"),
    ],
    ids=["newer schema", "cut short", "another field", "too deep"],
)
def test_a_manifest_that_breaks_the_schema_is_refused(
    snap: Snap, goldens_copy: Path, spoil: object, problem: str
) -> None:
    """By check, by verify and by list, with the reason."""
    assert callable(spoil)
    path = set_folder(goldens_copy) / "manifest.json"
    path.write_text(spoil(path.read_text(encoding="utf-8")), encoding="utf-8")
    checked = check_copy(snap, goldens_copy)
    assert checked.code == 3
    assert problem in error_lines(checked)[0]
    verified = snap("verify", "--goldens", goldens_copy)
    assert (verified.code, problem in verified.out) == (3, True)
    listed = snap("list", "--goldens", goldens_copy)
    assert (listed.code, "unreadable" in listed.out) == (3, True)


def test_diff_of_a_set_with_itself_finds_nothing(snap: Snap, goldens_copy: Path) -> None:
    """Equal bytes are equal."""
    run = snap("diff", set_folder(GOLDENS), set_folder(goldens_copy))
    assert (run.code, "the same: every tensor has the same bytes" in run.out) == (0, True)


def test_diff_names_what_moved_beyond_tolerance(
    snap: Snap, goldens_copy: Path, tmp_path: Path
) -> None:
    """A golden with one other element differs in that phase, case and tensor alone."""
    from safetensors.torch import load_file, save_file

    from snapshot_tool.goldens.manifest import encode
    from snapshot_tool.goldens.tensors import describe_file

    folder = set_folder(goldens_copy)
    path = folder / "connector.safetensors"
    tensors = load_file(path)
    moved = tensors["two-images/image_hidden_states"].clone()
    moved[3, 2, 7] += 0.5
    save_file({**tensors, "two-images/image_hidden_states": moved}, path)
    assert torch.isfinite(moved).all()
    manifest = msgspec.to_builtins(load_manifest(folder))
    manifest["files"]["connector.safetensors"] = msgspec.to_builtins(describe_file(path))
    (folder / "manifest.json").write_bytes(encode(manifest))
    run = snap("diff", set_folder(GOLDENS), folder)
    assert run.code == 1
    assert re.search(r"\nconnector +12 +1 +1  [0-9.e+]+x two-images / image_hidden", run.out)
    assert "connector / two-images / image_hidden_states: 1 of 13056 differ" in run.out
    page = tmp_path / "diff.html"
    report = snap("diff", set_folder(GOLDENS), folder, "--json", "-", "--html", page).report
    assert [(part["part"], part["largest"]) for part in report["parts"]] == [("connector", 0.5)]
    assert "two-images / image_hidden_states" in page.read_text(encoding="utf-8")
    assert "worst at [3, 2, 7]" in run.out


def test_doctor_says_what_works_here(snap: Snap) -> None:
    """With a checkout that has the family, checking works and recording does not."""
    run = snap("doctor", "--fms-path", CHECKOUT)
    assert run.code == 0
    assert "families: idefics3" in run.out
    assert "14 cases, golden version 4, usable here" in run.out
    assert "snap check works here: yes" in run.out
    assert "snap record works here: no" in run.out
    assert "transformers and accelerate not installed" in run.out
    assert f"checkpoint {ROOT / 'tests/checkpoints/tiny-idefics3'}" in run.out
    command = run.out.splitlines()[-1].removeprefix("next: snap ")
    assert snap(*shlex.split(command), "--case", "one-image", "--phase", "connector").code == 0


def test_doctor_judges_a_golden_by_the_fms_that_is_here(snap: Snap) -> None:
    """A golden set whose family FMS does not have cannot be checked."""
    run = snap("doctor", "--json")
    assert run.code == 3
    (golden,) = (f for f in run.report["findings"] if f["subject"].startswith("golden "))
    assert not golden["good"]
    assert "has no idefics3" in golden["detail"]
    assert not run.report["can_check"]


def test_doctor_says_why_nothing_works(snap: Snap, tmp_path: Path) -> None:
    """No goldens, whatever the installed FMS has: exit 3, with the reasons, also as JSON."""
    run = snap("doctor", "--goldens", tmp_path, "--json")
    assert run.code == 3
    findings = {finding["subject"]: finding for finding in run.report["findings"]}
    assert not findings["goldens"]["good"]
    assert "llama" in findings["fms"]["detail"]
    assert "idefics3" not in findings["fms"]["detail"]
    assert not findings["device cuda"]["good"]


def test_a_checkout_works_where_no_fms_is_installed(tmp_path: Path) -> None:
    """A plain git checkout has no package metadata; `fms/__init__.py` asks for it."""
    site = Path(next(path for path in sys.path if path.endswith("site-packages")))
    bare = tmp_path / "site"
    bare.mkdir()
    for entry in site.iterdir():
        if not entry.name.startswith(("fms", "ibm_fms")):
            (bare / entry.name).symlink_to(entry)
    program = (
        "import sys\n"
        f"sys.path = [p for p in sys.path if p != {str(site)!r}] + [{str(bare)!r}]\n"
        "from snapshot_tool.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    arguments = [
        "check",
        "--fms-path",
        str(CHECKOUT),
        "--case",
        "one-image",
        "--phase",
        "connector",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    answer = subprocess.run(
        [sys.executable, "-S", "-c", program, *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (answer.returncode, answer.stderr) == (0, "")
    assert "fms build/fms-checkout commit" in answer.stdout
    without = subprocess.run(
        [sys.executable, "-S", "-c", program, "check"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert without.returncode == 3
    assert "FMS is not installed here and no --fms-path was given" in without.stderr


def spoil_weights(folder: Path, change: object) -> None:
    """Rewrite a checkpoint's weights."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    assert callable(change)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            lambda tensors: tensors.update(extra=tensors["lm_head.weight"].clone()),
            "has 1 weights that nothing takes: extra",
        ),
        (
            lambda tensors: tensors.update(
                {"model.text_model.norm.weight": tensors["model.text_model.norm.weight"][:48]}
            ),
            "dec_norm.weight is (48,)",
        ),
    ],
    ids=["unused", "misshapen"],
)
def test_a_checkpoint_that_does_not_fill_the_model_is_refused(
    tmp_path: Path, change: object, problem: str
) -> None:
    """FMS is silent about weights that it does not take; snap is not."""
    with pytest.raises(CandidateUnavailable) as raised:
        load_spoilt(tmp_path, change)
    assert problem in raised.value.problem


def test_a_weight_that_the_checkpoint_lacks_is_nan_and_so_are_the_logits(tmp_path: Path) -> None:
    """FMS leaves what its memory held. The pooling head, which nothing uses, is unset as well."""
    candidate = load_spoilt(tmp_path, lambda tensors: tensors.pop("model.text_model.norm.weight"))
    missing = "text_model.base_model.dec_norm.weight"
    unset = candidate.unset_weights()
    assert [name for name in unset if not name.startswith("vision_tower.head.")] == [missing]
    weights = dict(candidate.model.named_parameters())
    assert all(bool(weights[name].isnan().all()) for name in unset)
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        logits = candidate.forward(CaseInputs(ids, torch.ones_like(ids)))
    assert bool(logits.isnan().all())


def load_spoilt(tmp_path: Path, change: object) -> FmsCandidate:
    """Load FMS's model from a checkpoint whose weights were changed."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(CHECKPOINT, folder)
    spoil_weights(folder, change)
    config = load_manifest(set_folder(GOLDENS)).checkpoint.config
    request = CandidateRequest(folder, config, "cpu", "float32")
    return load_fms_candidate(request, fms_path=CHECKOUT)
