"""The pytest plugin, on the committed goldens and the real FMS.

Most runs are in this process. They forget what they import, and torch cannot be imported twice: the
session's candidate and a check before them import all that they need.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree as ET

import msgspec
import pytest
from safetensors.torch import save_file

import snapshot_tool.pytest_plugin.nodes  # noqa: F401
from snapshot_tool.base.protocol import Phase
from snapshot_tool.candidates.answers import AskedGolden, weight_digests
from snapshot_tool.candidates.fms.candidate import FmsCandidate
from snapshot_tool.goldens.golden import Golden
from snapshot_tool.goldens.manifest import load_manifest
from tests.check.test_check import PHASES
from tests.conftest import CHECKOUT, GOLDENS, ROOT, Snap, imported_fms, set_folder
from tests.mutants.corpus import edit_of
from tests.mutants.mutant import plant

OWN_TESTS = """
import torch
from snapshot_tool.base.protocol import Phase

def test_vision_of_ones_own(snap_golden, snap_case, snap_candidate, snap_compare):
    pixels = snap_golden.inputs(snap_case).pixel_values
    with torch.inference_mode():
        features = snap_candidate.vision(pixels)
    snap_compare(features, case=snap_case, phase="vision")
    recorded = snap_golden.tensor(snap_case, Phase.VISION, "last_hidden_state")
    snap_compare(recorded, case=snap_case, phase="vision")
    if snap_case == "two-images":
        features = features.clone()
        features[0, 0, 0] += 1
        snap_compare(features, case=snap_case, phase="vision")
"""


@pytest.fixture(scope="module")
def imported(snap: Snap, candidate: FmsCandidate) -> None:
    """Check a little, so that everything is imported."""
    options = ("--case", "variant-02", "--phase", "forward", "--localise")
    assert snap("check", "--fms-path", CHECKOUT, *options).code == 0


@pytest.fixture
def golden_tests(
    imported: None, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> pytest.Pytester:
    """Run pytest elsewhere than in this repository, with its packages in reach."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # two workers need no more
    monkeypatch.setenv("COLUMNS", "300")  # the summary is cut at the terminal's width
    return pytester


def run(golden_tests: pytest.Pytester, *options: object, fms: Path = CHECKOUT) -> pytest.RunResult:
    """Run pytest on the goldens."""
    arguments = ["--snap-goldens", GOLDENS, "-p", "no:randomly", *options]
    if "--snap-candidate" not in options:
        arguments += ["--fms-path", fms]
    with imported_fms(fms.resolve()):
        return golden_tests.runpytest_inprocess(*map(str, arguments))


def collect(golden_tests: pytest.Pytester, *options: object) -> pytest.RunResult:
    """Collect the goldens, in this process."""
    arguments = ["--snap-goldens", GOLDENS, "--fms-path", CHECKOUT, "--collect-only", "-q"]
    return golden_tests.runpytest_inprocess(*map(str, [*arguments, *options]))


@pytest.fixture(scope="module")
def broken_fms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lay out an FMS with the wrong GELU in its vision encoder."""
    folder = tmp_path_factory.mktemp("broken") / "fms"
    plant(edit_of("exact-gelu"), checkout=CHECKOUT, out=folder)
    return folder


def test_a_run_without_goldens_imports_nothing_slow(golden_tests: pytest.Pytester) -> None:
    """Every pytest run of an environment with snap imports the plugin."""
    golden_tests.makepyfile(
        """
        import sys

        def test_imports():
            assert "snapshot_tool.pytest_plugin" in sys.modules
            mine = {name for name in sys.modules if name.startswith("snapshot_tool.")}
            assert {name.removeprefix("snapshot_tool.") for name in mine} == {
                *("base", "base.errors", "base.options", "base.protocol"),
                *("base.tolerance", "check", "check.request", "pytest_plugin", "record"),
            }
            assert not {"torch", "numpy", "msgspec", "transformers"} & sys.modules.keys()
        """
    )
    golden_tests.runpytest_subprocess().assert_outcomes(passed=1)


def test_every_phase_of_every_case_is_a_test(golden_tests: pytest.Pytester) -> None:
    """With an id of set, case and phase; text cases have two phases, the others five.

    The last one is of the candidate's weights.
    """
    found = collect(golden_tests)
    *ids, last = [line for line in found.outlines if "::" in line]
    assert last == "tiny-idefics3/cpu-float32::weights"
    assert len(ids) == 12 * 5 + 2 * 2
    assert all(re.search(r"^tiny-idefics3/cpu-float32::[a-z0-9-]+::[a-z]+$", line) for line in ids)
    assert len(set(ids)) == len(ids)


def test_a_shard_is_that_of_snap_check(golden_tests: pytest.Pytester) -> None:
    """Every third case, from the second; a share that cannot be is an error of usage."""
    names = [case.name for case in load_manifest(set_folder(GOLDENS)).cases]
    found = collect(golden_tests, "--snap-shard", "2/3")
    ids = [line.split("::") for line in found.outlines if line.count("::") == 2]
    assert list(dict.fromkeys(case for _, case, _ in ids)) == names[1::3]
    refused = collect(golden_tests, "--snap-shard", "4/3")
    assert refused.ret == pytest.ExitCode.USAGE_ERROR
    assert "invalid --shard 4/3: expected K/N" in refused.stderr.str()


def test_faults_fail_their_phases_in_two_workers_and_in_junit(
    golden_tests: pytest.Pytester, broken_fms: Path
) -> None:
    """-n 2, --junitxml, -k and --lf do with golden tests what they do with others."""
    where = ("--snap-goldens", GOLDENS, "--fms-path", broken_fms)
    options = ("-n", "2", "--junitxml", "out.xml", "-k", "one-image", "-p", "no:randomly")
    first = golden_tests.runpytest_subprocess(*map(str, (*where, *options)))
    first.assert_outcomes(passed=3, failed=2)
    text = first.stdout.str()
    assert "Traceback" not in text
    assert "pytest_nodes.py" not in text
    first.stdout.fnmatch_lines(
        [
            "FAIL vision / one-image / last_hidden_state: 13[0-9][0-9] of 69632 differ*",
            "*worst at *allowed)",
        ]
    )
    first.stdout.fnmatch_lines(["first wrong in model.vision_model.encoder.layers.0.mlp.*"])
    summary = "tiny-idefics3/cpu-float32::one-image::vision - Failed: 13"
    (line,) = (line for line in first.outlines if summary in line)
    assert "first wrong: vision_tower.base_model.encoder.layers.0.mlp" in line
    first.stdout.fnmatch_lines([f"snap: checked fms {broken_fms} commit * (dirty)"])
    cases = ET.parse(golden_tests.path / "out.xml").findall(".//testcase")
    failed = {case.get("name") for case in cases if case.find("failure") is not None}
    assert (len(cases), failed) == (5, {"vision", "forward"})
    names = {p.get("name") for case in cases for p in case.iter("property")}
    assert {"snap candidate", "last_hidden_state tolerance used"} <= names
    again = run(golden_tests, "--lf", "-x", fms=broken_fms)
    again.assert_outcomes(failed=1)


def test_a_phase_that_the_candidate_lacks_is_skipped_with_its_reason(
    golden_tests: pytest.Pytester,
) -> None:
    """A skip is pytest's skip, never a pass; the candidate is loaded once for all tests."""
    golden_tests.makepyfile(
        counted="""
        from pathlib import Path
        from tests.candidates import HasNoGeneration

        def load(request):
            with Path("loads.txt").open("a") as loads:
                loads.write("once ")
            return HasNoGeneration(request)
        """
    )
    options = ("--snap-candidate", "counted:load", "--snap-case", "one-image", "-rs")
    found = run(golden_tests, *options)
    found.assert_outcomes(passed=3, skipped=3)
    found.stdout.fnmatch_lines(["SKIPPED*the decoder is not ported yet"])
    found.stdout.fnmatch_lines(["SKIPPED*the candidate has no method 'generate'"])
    found.stdout.fnmatch_lines(["SKIPPED*the candidate has no method 'weights'"])
    assert (golden_tests.path / "loads.txt").read_text() == "once "


def test_a_weight_that_is_not_the_checkpoints_fails_a_test_of_its_own(
    golden_tests: pytest.Pytester,
) -> None:
    """Named, where every answer is right."""
    wrong = ("--snap-candidate", "tests.check.wrong_weights:unused_embedding_doubled")
    found = run(golden_tests, *wrong, "--snap-case", "variant-02")
    found.assert_outcomes(passed=2, failed=1)
    found.stdout.fnmatch_lines(["text_model.base_model.embedding.weight (*: 96 of * differ *"])


def test_what_the_candidate_raises_fails_its_phase_alone(golden_tests: pytest.Pytester) -> None:
    """In snap's words, with the place in the candidate and its traceback."""
    phases = ("--snap-phase", "connector", "--snap-phase", "vision")
    wrong = ("--snap-candidate", "tests.candidates:Raises", "--snap-case", "one-image")
    found = run(golden_tests, *wrong, *phases)
    found.assert_outcomes(passed=1, failed=1, skipped=1)
    found.stdout.fnmatch_lines(
        [
            "ERROR connector / one-image: RuntimeError: no connector for 17 tiles, at "
            "*tests/candidates.py:* in Raises.connector",
            "Traceback *",
        ]
    )
    assert "judge/phases.py" not in found.stdout.str()


def test_people_write_tests_of_their_own_on_goldens(golden_tests: pytest.Pytester) -> None:
    """The fixtures give the golden set, each case, the candidate, and a comparison that asserts."""
    golden_tests.makepyfile(OWN_TESTS)
    found = run(
        golden_tests,
        "--snap-case",
        "*image*",
        "test_people_write_tests_of_their_own_on_goldens.py",
        "--snap-phase",
        "vision",
    )
    found.assert_outcomes(passed=4, failed=1)
    found.stdout.fnmatch_lines(["*FAIL vision / two-images / last_hidden_state: 1 of *"])


def test_a_candidate_that_cannot_be_loaded_is_tried_once(golden_tests: pytest.Pytester) -> None:
    """Every test says why, in snap's two lines."""
    found = run(golden_tests, "--snap-phase", "vision", fms=golden_tests.path)
    found.assert_outcomes(errors=13)
    found.stdout.fnmatch_lines(["--fms-path * is not an FMS checkout: it has no fms/__init__.py"])
    assert "Traceback" not in found.stdout.str()
    assert "pytest_nodes.py" not in found.stdout.str()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--snap-case", "three*"], "--case three* matches none of the 14 cases"),
        (["--snap-tolerance", "loose"], "invalid choice: 'loose'"),
        (["--snap-phase", "vision,sight"], "phase is 'sight'"),
        (["--snap-repeat", "0"], "repeat is 0"),
        (["--snap-revision", "0123"], "no golden for any checkpoint at 0123"),
    ],
)
def test_options_that_name_nothing_are_usage_errors(
    golden_tests: pytest.Pytester, options: list[str], problem: str
) -> None:
    """Nothing is collected, and pytest's own code for wrong usage is returned."""
    found = collect(golden_tests, *options)
    assert found.ret in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.INTERRUPTED)
    assert problem in found.stdout.str() + found.stderr.str()
    assert "Traceback" not in found.stdout.str() + found.stderr.str()


def test_goldens_stand_alone_on_the_command_line_and_add_up_in_addopts(
    golden_tests: pytest.Pytester,
) -> None:
    """A golden run is not the project's whole suite; a configured one is part of it."""
    golden_tests.makepyfile(test_own="def test_own(): pass")
    shutil.copytree(GOLDENS, golden_tests.path / "goldens")
    golden_tests.makeini("[pytest]\naddopts = --collect-only -q --snap-case one-image")
    alone = collected(golden_tests.runpytest_inprocess("--snap-goldens", "goldens"))
    assert [name.rpartition("::")[2] for name in alone] == [*PHASES, "weights"]
    both = collected(golden_tests.runpytest_inprocess("--snap-goldens=goldens", "test_own.py"))
    assert both == ["test_own.py::test_own", *alone]
    one = collected(golden_tests.runpytest_inprocess("--snap-goldens", "goldens", alone[3]))
    assert one == [alone[3]]
    golden_tests.makeini(
        "[pytest]\naddopts = --collect-only -q --snap-case one-image --snap-goldens goldens"
    )
    assert sorted(collected(golden_tests.runpytest_inprocess())) == sorted(both)


def collected(found: pytest.RunResult) -> list[str]:
    """Return the ids that --collect-only printed."""
    return [line for line in found.outlines if "::" in line]


def test_answers_from_elsewhere_are_judged(
    golden_tests: pytest.Pytester, golden: Golden, tmp_path: Path
) -> None:
    """Phases that were answered pass or fail, the others are skipped; nothing is loaded."""
    names = ("variant-02", "two-images")
    tokens = {c: golden.tensor(c, Phase.GENERATE, "token_ids").clone() for c in names}
    tokens["two-images"][0] += 1
    save_file(
        {f"{c}/generate.token_ids": t for c, t in tokens.items()}, tmp_path / "answers.safetensors"
    )
    header = {
        "schema": "snap-answers/1",
        "golden": msgspec.to_builtins(AskedGolden.of(golden)),
        "engine": "elsewhere",
        "version": "1",
        "device": "spyre",
        "dtype": "float32",
        "checkpoint": list(weight_digests(golden).values()),
    }
    (tmp_path / "answers.json").write_text(json.dumps(header))
    options = (
        "--snap-goldens",
        GOLDENS,
        "--snap-answers",
        tmp_path,
        "--snap-case",
        ",".join(names),
    )
    found = golden_tests.inline_run(*map(str, options))
    passed, skipped, failed = found.listoutcomes()
    assert [report.nodeid.split("::", 1)[1] for report in passed] == ["variant-02::generate"]
    assert [report.nodeid.split("::", 1)[1] for report in failed] == ["two-images::generate"]
    assert len(skipped) == 5
