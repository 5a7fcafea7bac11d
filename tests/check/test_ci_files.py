"""What is offered to other people's CI is valid by GitHub's and pre-commit's schemas, and runs.

Only what needs GitHub itself is left out: its actions (`uses:`) and the steps that install.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import CHECKOUT, CHECKPOINT, GOLDENS, ROOT, set_folder
from tests.mutants.mutant import Edit, plant

RECORD = ROOT / ".github" / "workflows" / "record.yml"
ACTION = ROOT / "action.yml"
BIN = str(Path(sys.executable).parent)


def load(path: Path) -> Any:
    """Read a YAML file."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _filled(text: str, inputs: Mapping[str, str]) -> str:
    return re.sub(r"\$\{\{ inputs\.([\w-]+) \}\}", lambda match: inputs[match[1]], text)


def run_step(
    steps: list[Any], name: str, *, inputs: Mapping[str, str], cwd: Path, **more: str
) -> subprocess.CompletedProcess[str]:
    """Run a step's script as GitHub does, with its variables filled in from the inputs."""
    (step,) = (step for step in steps if step.get("name") == name)
    wanted = {**step.get("env", {}), **more}
    variables = {key: _filled(text, inputs) for key, text in wanted.items()}
    assert "${{" not in step["run"], "an expression in a script can be made to run anything"
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
        cwd=cwd, capture_output=True, text=True, check=False,
        env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", **variables},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("schema", "path"), [("vendor.github-workflows", RECORD), ("vendor.github-actions", ACTION)]
)
def test_the_files_follow_githubs_schemas(schema: str, path: Path) -> None:
    """The schemas that check-jsonschema brings along: nothing is fetched."""
    command = [f"{BIN}/check-jsonschema", "--builtin-schema", schema, str(path)]
    subprocess.run(command, check=True)


def action_inputs(**inputs: str) -> dict[str, str]:
    """Return the action's inputs with their defaults."""
    return {name: spec["default"] for name, spec in load(ACTION)["inputs"].items()} | inputs


def run_action(
    folder: Path, options: str, *, fms: Path = CHECKOUT
) -> subprocess.CompletedProcess[str]:
    """Run the action's check on the committed goldens."""
    inputs = action_inputs(**{"fms-path": str(fms), "goldens": str(GOLDENS), "options": options})
    summary = str(folder / "summary.md")
    steps = load(ACTION)["runs"]["steps"]
    return run_step(steps, "Check", inputs=inputs, cwd=folder, GITHUB_STEP_SUMMARY=summary)


def test_the_action_checks_and_writes_a_summary(tmp_path: Path) -> None:
    """With snap's exit code, three reports, and the Markdown on the run's page."""
    run = run_action(tmp_path, "--case one-image --phase connector")
    assert (run.returncode, run.stderr) == (0, "")
    assert "PASS: 1 passed" in run.stdout
    written = {path.name for path in (tmp_path / "snap-report").iterdir()}
    assert written == {"report.json", "report.html", "report.md"}
    summary = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert summary.startswith("### ")
    assert "PASS: 1 passed" in summary.splitlines()[0]


def test_the_action_annotates_the_line_that_raised(tmp_path: Path) -> None:
    """A failing check fails the step, and its summary and annotations are there."""
    norm = "last_hidden_state = self.post_layernorm(last_hidden_state)"
    raising = Edit("fms/models/siglip_vision.py", norm, 'raise RuntimeError("no norm")')
    plant(raising, checkout=CHECKOUT, out=tmp_path / "fms")
    run = run_action(tmp_path, "--case one-image --phase vision", fms=Path("fms"))
    assert run.returncode == 1
    (line,) = (line for line in run.stdout.splitlines() if line.startswith("::error "))
    where = line.partition("file=")[2].partition("::")[0]
    file, _, number = where.partition(",line=")
    assert file == "fms/fms/models/siglip_vision.py"
    source = (tmp_path / file).read_text(encoding="utf-8").splitlines()
    assert "no norm" in source[int(number) - 1]
    assert "ERROR vision" in (tmp_path / "summary.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("heading", "schema"), [("GitLab", "gitlab-ci"), ("Buildkite", "buildkite")]
)
def test_the_examples_for_other_systems_follow_their_schemas(
    tmp_path: Path, heading: str, schema: str
) -> None:
    """As check-jsonschema brings them along."""
    page = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
    _, _, after = page.partition(f"## {heading}\n```yaml\n")
    path = tmp_path / "example.yml"
    path.write_text(after.partition("```")[0], encoding="utf-8")
    command = [f"{BIN}/check-jsonschema", "--builtin-schema", f"vendor.{schema}", str(path)]
    subprocess.run(command, check=True)


def test_the_action_fails_as_snap_does_and_runs_nothing_that_is_typed(tmp_path: Path) -> None:
    """An option is an option, whatever the shell would make of it."""
    run = run_action(tmp_path, "--case $(touch${IFS}pwned);touch pwned")
    assert run.returncode == 2
    assert not list(tmp_path.glob("**/pwned"))


def test_the_action_pulls_what_the_lock_names(tmp_path: Path) -> None:
    """The sets of goldens.lock, before the check."""
    goldens = Path(shutil.copytree(GOLDENS, tmp_path / "goldens"))
    push = [f"{BIN}/snap", "push", f"file://{tmp_path}/remote", "--goldens", str(goldens)]
    subprocess.run(push, check=True, capture_output=True)
    shutil.rmtree(goldens)
    steps = load(ACTION)["runs"]["steps"]
    run = run_step(steps, "Pull", inputs=action_inputs(), cwd=tmp_path)
    assert (run.returncode, run.stderr) == (0, "")
    assert set_folder(goldens).name == "cpu-float32"


@pytest.mark.record
def test_the_workflow_records_verifies_and_pushes(tmp_path: Path) -> None:
    """Its scripts, on the embedded checkpoint and a folder in the place of the hub."""
    workflow = load(RECORD)
    job = workflow["jobs"]["record"]
    inputs = {
        "checkpoint": str(CHECKPOINT),
        "revision": set_folder(GOLDENS).parent.name,
        "variants": "0",
        "remote": f"file://{tmp_path}/remote",
    }
    # YAML 1.1 reads the key `on` as true.
    assert set(workflow[True]["workflow_dispatch"]["inputs"]) == set(inputs)
    for name in ("Record", "Verify", "Push"):
        run = run_step(job["steps"], name, inputs=inputs, cwd=tmp_path, **job["env"])
        assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("pushed  local/tiny-idefics3 at ")
    assert (tmp_path / "share" / "goldens.lock").is_file()


@pytest.fixture
def hooked(tmp_path: Path) -> Path:
    """Return a repository with goldens that uses the hook, from a repository that offers it."""
    offers, uses = tmp_path / "snap", tmp_path / "port"
    offers.mkdir()
    shutil.copy(ROOT / ".pre-commit-hooks.yaml", offers)
    shutil.copytree(GOLDENS, uses / "goldens", ignore=shutil.ignore_patterns(".snap"))
    for repository in (offers, uses):
        git(repository, "init", "--quiet")
        git(repository, "add", "--all")
        git(repository, "commit", "--quiet", "--message", "first")
    config = {"repos": [{"repo": str(offers), "rev": git(offers, "rev-parse", "HEAD"),
                         "hooks": [{"id": "snap-verify"}]}]}  # fmt: skip
    (uses / ".pre-commit-config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    git(uses, "add", "--all")
    return uses


def git(repository: Path, *arguments: str) -> str:
    """Run git as somebody."""
    identity = ["-c", "user.name=somebody", "-c", "user.email=somebody@localhost"]
    answer = subprocess.run(
        ["git", "-C", str(repository), *identity, *arguments],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return answer.stdout.strip()


def test_the_pre_commit_hook_refuses_a_damaged_golden(hooked: Path, tmp_path: Path) -> None:
    """pre-commit itself runs it; nothing is installed for it."""
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}",
                   "PRE_COMMIT_HOME": str(tmp_path / "cache")}  # fmt: skip
    command = [f"{BIN}/pre-commit", "run", "--all-files"]

    def commit() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=hooked, env=environment, capture_output=True, text=True, check=False
        )

    whole = commit()
    assert whole.returncode == 0, whole.stdout + whole.stderr
    assert "Passed" in whole.stdout
    path = set_folder(hooked / "goldens") / "vision.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    git(hooked, "add", "--all")
    damaged = commit()
    assert damaged.returncode == 1
    assert "vision.safetensors was altered" in damaged.stdout
