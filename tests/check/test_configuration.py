"""Defaults of options from pyproject.toml and from variables, and `snap init`."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.conftest import ROOT, Run, run_snap, run_snap_here

FAMILIES = ROOT / "tests" / "families"
TABLE = f"""
[tool.snap]
goldens = "{FAMILIES.name}/goldens"
checkpoint = "roberta"
case = ["one-sentence", "left-padded"]
quick = true

[tool.snap.record]
variants = 3
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Return a project with defaults, beside the golden sets of llama and roberta."""
    (tmp_path / FAMILIES.name).symlink_to(FAMILIES)
    (tmp_path / "pyproject.toml").write_text(TABLE, encoding="utf-8")
    return tmp_path


def check(folder: Path, *options: object, **environment: str) -> Run:
    """Check in a folder, with the report as JSON."""
    path = {"PYTHONPATH": str(ROOT)}
    return run_snap("check", *options, "--json", "-", cwd=folder, **path, **environment)


def test_the_project_gives_options_defaults_also_in_its_folders(project: Path) -> None:
    """The report says which; paths start from the file."""
    below = project / "below"
    below.mkdir()
    run = run_snap_here("check", "--json", "-", cwd=below)
    assert run.code == 0, run.err
    report = run.report
    assert report["golden"]["checkpoint"] == "local/roberta"
    assert {result["case"] for result in report["results"]} == {"one-sentence", "left-padded"}
    assert report["quick"]
    assert "--checkpoint roberta (pyproject.toml)" in report["environment"]["options"]


def test_what_is_typed_comes_before_a_variable_and_that_before_the_file(project: Path) -> None:
    """The report lists only what was not typed."""
    run = check(project, "--checkpoint", "llama", SNAP_CASE="variant-01", SNAP_CHECKPOINT="nothing")
    assert run.code == 0, run.err
    assert run.report["golden"]["checkpoint"] == "local/llama"
    assert {result["case"] for result in run.report["results"]} == {"variant-01"}
    options = run.report["environment"]["options"]
    assert "--case variant-01 (SNAP_CASE)" in options
    assert "--checkpoint" not in options


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("goldns = 'x'", "did you mean goldens?"),
        ("goldens = ", "is not valid TOML"),
        ("check = 'x'", "must be tables"),
    ],
)
def test_a_default_that_is_wrong_names_the_file(project: Path, line: str, problem: str) -> None:
    """Nothing in it is ignored in silence."""
    (project / "pyproject.toml").write_text(f"[tool.snap]\n{line}\n", encoding="utf-8")
    run = run_snap_here("list", cwd=project)
    assert run.code == 2
    assert "pyproject.toml" in run.err
    assert problem in run.err


def test_init_writes_defaults_that_work_and_a_valid_workflow_and_replaces_nothing(
    tmp_path: Path,
) -> None:
    """What the project has already stays."""
    config = tmp_path / "pyproject.toml"
    config.write_text('[project]\nname = "port"\n', encoding="utf-8")
    options = ("--fms-path", ROOT / "build" / "fms-checkout", "--goldens", ROOT / "goldens")
    run = run_snap_here("init", *options, cwd=tmp_path)
    assert run.code == 0, run.err
    table = tomllib.loads(config.read_text("utf-8"))
    assert table["project"]["name"] == "port"
    assert table["tool"]["snap"]["goldens"] == str(ROOT / "goldens")
    workflow = tmp_path / ".github" / "workflows" / "snap.yml"
    command = [f"{Path(sys.executable).parent}/check-jsonschema", "--builtin-schema"]
    subprocess.run([*command, "vendor.github-workflows", str(workflow)], check=True)
    run = check(tmp_path, "--case", "one-image", "--phase", "connector")
    assert run.code == 0, run.err
    before = config.read_bytes(), workflow.read_bytes()
    assert run_snap_here("init", cwd=tmp_path).code == 0
    assert (config.read_bytes(), workflow.read_bytes()) == before
