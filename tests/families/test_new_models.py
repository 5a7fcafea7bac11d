"""Models that snap declares no family of: recorded, and checked with a candidate or with FMS."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT, Run, Snap, error_lines
from tests.fms_checkout.build import installed_fms
from tests.mutants.mutant import Edit, plant

PORT = Path(__file__).parent / "ports" / "phi3.py"
PAGE = "docs/adding-a-family.md"
PHI3, GEMMA = "phi3", "gemma"
RIGHT = {
    PHI3: "tests.examples.plain_phi3:Candidate",
    GEMMA: "tests.families.new_models:GemmaCandidate",
}
WRONG = {
    "SwapsGate": (PHI3, "model.layers.0.mlp"),
    "PlainNormCandidate": (GEMMA, "model.layers.0.input_layernorm"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the checkpoints and record them, in the record environment, with no declaration."""
    root = tmp_path_factory.mktemp("new")
    program = [".venv-record/bin/python", "-m", "tests.families.record"]
    command = [*program, "--out", str(root), "--variants", "2", PHI3, GEMMA]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return root


def check(snap: Snap, folder: Path, name: str, *options: object) -> Run:
    """Check one model's golden set."""
    where = ("--goldens", folder / "goldens", "--checkpoint", folder / "checkpoints" / name)
    return snap("check", *where, *options)


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lay out the installed FMS with the port of Phi-3 in it."""
    root = tmp_path_factory.mktemp("port")
    shutil.copytree(installed_fms(), root / "fms")
    shutil.copy(PORT, root / "fms" / "models" / "phi3.py")
    with (root / "fms" / "models" / "__init__.py").open("a") as file:
        file.write("\nfrom fms.models import phi3  # noqa: E402, F401\n")
    return root


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_candidate_passes(snap: Snap, folder: Path, name: str) -> None:
    """Forward and generate of every case, and the derived questions that it can be asked."""
    run = check(snap, folder, name, "--candidate", RIGHT[name], "--explore", 20, "--json", "-")
    assert run.code == 0, run.out
    passed = {r["phase"] for r in run.report["results"] if r["verdict"] == "pass"}
    assert passed == {"forward", "generate"}
    asked = {k["kind"]: k["verdict"] for k in run.report["exploration"]["kinds"] if k["asked"]}
    assert asked == dict.fromkeys(("prefix", "padding", "shorter", "resumed"), "pass")
    assert run.report["environment"]["transformers_imported"] is False


@pytest.mark.parametrize("candidate", WRONG)
def test_a_wrong_candidate_fails_and_its_module_is_named(
    snap: Snap, folder: Path, candidate: str
) -> None:
    """By Hugging Face's name, inferred from shapes, order and values."""
    name, module = WRONG[candidate]
    spec = f"tests.families.new_models:{candidate}"
    run = check(snap, folder, name, "--candidate", spec, "--json", "-")
    assert run.code == 1
    assert run.report["first_divergence"]["phase"] == "forward"
    assert run.report["first_divergence"]["module"] == module


def test_fms_with_an_architecture_of_that_name_passes(snap: Snap, folder: Path, port: Path) -> None:
    """Its configuration is filled in by names, and the report says so; weights are compared."""
    run = check(snap, folder, PHI3, "--fms-path", port, "--localise", "--json", "-")
    assert run.code == 0, run.out
    (note,) = run.report["environment"]["candidate"]["notes"]
    assert "no family declares it" in note
    assert run.report["weights"]["compared"] == 14
    mapping = run.report["module_mapping"]
    assert mapping["inferred"]
    assert mapping["confirmed"] >= 20


def test_a_fault_in_that_fms_is_named_by_inference(
    snap: Snap, folder: Path, port: Path, tmp_path: Path
) -> None:
    """Its modules have no declared partners."""
    edit = Edit("fms/models/llama.py", "ratio=self.config.rope_theta,", "ratio=10_000.0,")
    plant(edit, checkout=port, out=tmp_path / "broken")
    run = check(snap, folder, PHI3, "--fms-path", tmp_path / "broken", "--json", "-")
    assert run.code == 1
    assert run.report["first_divergence"]["module"] == "model.layers.0.self_attn"


def test_fms_that_lacks_the_architecture_or_a_size_is_refused(
    snap: Snap, folder: Path, port: Path, tmp_path: Path
) -> None:
    """The error names what is missing, and the page on declaring a family."""
    shutil.copytree(port, tmp_path / "own")
    for file in (tmp_path / "own" / "fms" / "models").glob("*.py"):
        file.write_text(file.read_text("utf-8").replace("emb_dim", "width"), "utf-8")
    for name, options, message in (
        (GEMMA, (), "has no gemma"),
        (PHI3, ("--fms-path", tmp_path / "own"), "no field emb_dim"),
    ):
        run = check(snap, folder, name, *options)
        assert run.code == 3
        problem, remedy = error_lines(run)
        assert message in problem
        assert PAGE in remedy
