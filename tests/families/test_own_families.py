"""Families of the user's own: a file that is named with --family, on both sides and everywhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from snapshot_tool.base.errors import FamilyInvalid
from snapshot_tool.families import find_family, name_families
from tests.check.test_torchrun import launch
from tests.conftest import CHECKOUT, CHECKPOINT, ROOT, Run, Snap, error_lines
from tests.fms_checkout.build import installed_fms
from tests.mutants.corpus import edit_of
from tests.mutants.mutant import Edit, plant

BUILD = ROOT / "tests" / "checkpoints" / "build_families.py"
PAGE = "docs/adding-a-family.md"
EXAMPLE = ROOT / "tests" / "examples" / "xlm_roberta.py"
GELU = edit_of("exact-gelu")
# All that a family can have: images, captures, a connector, names of modules.
OWN = """
from dataclasses import replace
from pathlib import Path

from snapshot_tool.families.idefics3 import IDEFICS3

MINE = replace(IDEFICS3, name="mine")
Path({canary!r}).touch()
"""


WRONG = ROOT / "tests" / "families" / "checkpoints" / "llama"


@dataclass(frozen=True, slots=True)
class Recorded:
    """A golden set that was recorded with a family's file, and its checkpoint."""

    goldens: Path
    checkpoint: Path
    file: Path

    @property
    def where(self) -> tuple[object, ...]:
        """Say which set is meant."""
        return "--goldens", self.goldens, "--checkpoint", self.checkpoint

    def check(self, snap: Snap, *options: object) -> Run:
        """Check it without naming a family."""
        return snap("check", *self.where, *options)


def run_reference(*arguments: object) -> None:
    """Run `snap` in the record environment."""
    command = [str(ROOT / ".venv-record" / "bin" / "snap"), *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    answer = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """Record the tutorial's checkpoint with the tutorial's file."""
    root = tmp_path_factory.mktemp("text")
    python = str(ROOT / ".venv-record" / "bin" / "python")
    subprocess.run([python, str(BUILD), str(root), "xlm-roberta"], check=True, capture_output=True)
    found = Recorded(root / "goldens", root / "xlm-roberta", EXAMPLE)
    run_reference("record", *found.where, "--variants", 1, "--family", EXAMPLE)
    return found


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """Record the embedded checkpoint under a family of one's own, with an oracle."""
    root = tmp_path_factory.mktemp("images")
    file = root / "own_family.py"
    file.write_text(OWN.format(canary=str(root / "canary")), "utf-8")
    found = Recorded(root / "goldens", CHECKPOINT, file)
    options = ("--variants", 0, "--max-new-tokens", 6, "--oracle", "--family", file)
    run_reference("record", *found.where, *options)
    return found


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lay out an FMS with the wrong GELU in its vision encoder."""
    folder = tmp_path_factory.mktemp("broken") / "fms"
    plant(GELU, checkout=CHECKOUT, out=folder)
    return folder


def test_the_tutorials_file_passes_and_names_the_module_of_a_fault(
    snap: Snap, text: Recorded, tmp_path: Path
) -> None:
    """By the names that the file declares."""
    passing = text.check(snap, "--family", EXAMPLE, "--json", "-")
    assert passing.code == 0, passing.out
    judged = {r["tensor"] for r in passing.report["results"] if r["verdict"] == "pass"}
    assert {"logits", "last_hidden_state"} <= judged
    installed = tmp_path / "installed"
    shutil.copytree(installed_fms(), installed / "fms")
    sums = "x = x_emb + token_type_out + position_out"
    edit = Edit("fms/models/roberta.py", sums, "x = x_emb + position_out")
    plant(edit, checkout=installed, out=tmp_path / "broken")
    options = ("--family", EXAMPLE, "--fms-path", tmp_path / "broken", "--json", "-")
    failing = text.check(snap, *options)
    assert failing.code == 1
    assert failing.report["first_divergence"]["module"] == "roberta.embeddings"


def test_a_family_with_images_has_all_that_snaps_own_have(snap: Snap, images: Recorded) -> None:
    """Five phases, derived questions, and the oracle as the judge."""
    options = ("--fms-path", CHECKOUT, "--explore", 9, "--tolerance", "oracle", "--json", "-")
    run = images.check(snap, "--family", images.file, *options)
    assert run.code == 0, run.out
    passed = {r["phase"] for r in run.report["results"] if r["verdict"] == "pass"}
    assert passed >= {"vision", "connector", "forward", "generate"}
    asked = {k["kind"] for k in run.report["exploration"]["kinds"] if k["verdict"] == "pass"}
    assert {"tiles", "connector-tiles", "padding", "batch"} <= asked


def test_a_fault_in_its_images_part_is_named_and_grafted(
    snap: Snap, images: Recorded, broken: Path
) -> None:
    """What it captures is put in the module's place."""
    module = "model.vision_model"
    options = ("--fms-path", broken, "--graft", module, "--case", "one-image", "--json", "-")
    run = images.check(snap, "--family", images.file, *options)
    assert run.code == 1
    first = run.report["first_divergence"]
    assert (first["phase"], first["module"]) == (
        "vision", "model.vision_model.encoder.layers.0.mlp.activation_fn",
    )  # fmt: skip
    assert run.report["graft"]["module"] == module


def test_a_golden_set_runs_no_code(
    snap: Snap, images: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names the family; a file and an entry point of that name run only if they are named.

    And not before the checkpoint is verified.
    """
    canary = images.file.parent / "canary"
    folder = tmp_path / "offers_mine-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: offers-mine\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[snapshot_tool.families]\nmine = mine\n")
    shutil.copy(images.file, tmp_path / "mine.py")
    canary.unlink(missing_ok=True)
    options = ("--fms-path", CHECKOUT, "--case", "one-image", "--phase", "connector")
    monkeypatch.syspath_prepend(tmp_path)
    run = images.check(snap, *options)
    assert run.code == 3
    problem, remedy = error_lines(run)
    assert "'mine'" in problem
    assert "--family FILE.py" in remedy
    assert PAGE in remedy
    where = ("--goldens", images.goldens, "--checkpoint", WRONG, "--fms-path", CHECKOUT)
    assert snap("check", *where, "--family", images.file).code == 3
    assert not canary.exists()
    named = images.check(snap, *options, "--family", "mine")
    assert named.code == 0, named.err
    assert canary.exists()


def test_a_file_may_change_unless_it_declares_other_answers(
    snap: Snap, text: Recorded, tmp_path: Path
) -> None:
    """The report notes the change. Other answers than the recorded ones cannot be compared."""
    changed, source = tmp_path / "xlm_roberta.py", EXAMPLE.read_text("utf-8")
    assert text.check(snap, "--family", EXAMPLE, "--json", "-").report["recorded_elsewhere"] == []
    changed.write_text(f"{source}\n# a line more\n", "utf-8")
    report = text.check(snap, "--family", changed, "--json", "-").report
    (difference,) = report["recorded_elsewhere"]
    assert difference.startswith("family_file ")
    assert report["verdict"] == "pass"
    changed.write_text(source.replace('"last_hidden_state", "roberta"', '"pooled", "lm_head"'))
    run = text.check(snap, "--family", changed)
    assert run.code == 3
    problem, remedy = error_lines(run)
    assert "last_hidden_state" in problem
    assert "--update" in remedy


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import no_such_module", "no_such_module"),
        ("x = 1", "declares no Family"),
        ("F = Family('llama', 'X', P)", "one of snap's own"),
        ("F = Family('XForCausalLM', 'X', P)", "one of snap's own"),
        ("F = Family('x', 'X', (Phase.VISION,))", "`compared`"),
        ("F = Family('x', 'X', (Phase.GENERATE,))", "neither forward nor vision"),
        ("F = Family('x', 'X', P, logits=False)", "nothing of forward"),
        (
            "F = Family('x', 'X', P, FmsPort('x', dict, FmsCalls, (ModulePair('(', ''),)))",
            "pattern",
        ),
    ],
)
def test_a_declaration_that_cannot_work_is_refused(tmp_path: Path, code: str, message: str) -> None:
    """When it is first needed."""
    file = tmp_path / "bad.py"
    imported = "from snapshot_tool.families import Family, FmsCalls, FmsPort, ModulePair, Phase"
    file.write_text(f"{imported}\nP = (Phase.FORWARD,)\n{code}\n", "utf-8")
    name_families([str(file)])
    with pytest.raises(FamilyInvalid, match=re.escape(message)):
        find_family("llama")


def test_a_family_belongs_to_the_run_that_names_it(tmp_path: Path) -> None:
    """A script may check one golden set with its family, and another one without."""
    file = tmp_path / "own.py"
    file.write_text(OWN.format(canary=str(tmp_path / "canary")), "utf-8")
    name_families([str(file)])
    assert find_family("mine") is not None
    name_families([])
    assert find_family("mine") is None


@pytest.mark.parametrize("name", ["no_such.py", "no-such-entry-point"])
def test_a_family_that_is_not_there_is_refused(snap: Snap, text: Recorded, name: str) -> None:
    """A file as well as an entry point."""
    run = text.check(snap, "--family", name)
    assert run.code == 2
    assert name in error_lines(run)[0]


def test_pytest_runs_it(images: Recorded, pytester: pytest.Pytester) -> None:
    """In the workers of pytest-xdist, too."""
    options = [
        *("--snap-goldens", images.goldens, "--snap-checkpoint", images.checkpoint),
        *("--fms-path", CHECKOUT, "--snap-case", "one-image", "--snap-phase", "connector"),
        *("--snap-phase", "vision", "-n", "1", "-p", "no:randomly"),
    ]
    run = pytester.runpytest_subprocess(*map(str, options), "--snap-family", str(images.file))
    run.assert_outcomes(passed=3)


def test_traces_are_compared_by_its_names(snap: Snap, text: Recorded, tmp_path: Path) -> None:
    """Without the file they are inferred."""
    hf, fms = tmp_path / "hf.safetensors", tmp_path / "fms.safetensors"
    options = (*text.where, "--case", "one-sentence")
    run_reference("trace", "--impl", "hf", *options, "--family", EXAMPLE, "--out", hf)
    traced = snap("trace", *options, "--family", EXAMPLE, "--out", fms)
    assert traced.code == 0, traced.err
    for family, inferred in ((("--family", EXAMPLE), False), ((), True)):
        run = snap("compare-traces", hf, fms, *family, "--json", "-")
        assert run.code == 0, run.out
        assert run.report["inferred"] is inferred


def test_every_rank_of_torchrun_has_it(images: Recorded, tmp_path: Path) -> None:
    """FMS is built on each by the declaration."""
    options = ("--case", "one-image", "--phase", "vision", "--phase", "forward")
    where = (*images.where, "--family", images.file, "--fms-path", CHECKOUT)
    split = launch(tmp_path, *where, *options)
    assert split.code == 0, split.err
    assert {r["verdict"] for r in split.report["results"]} == {"pass"}
