"""`snap check` on the committed goldens and the real FMS: verdicts, exit codes, reports."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import CHECKOUT, CHECKPOINT, GOLDENS, ROOT, Run, Snap, error_lines, set_folder

PHASES = ["preprocessing", "vision", "connector", "forward", "generate"]
FIGURES = [
    *("case", "phase", "tensor", "verdict", "reason", "max_abs", "max_rel", "mean_abs", "rmse"),
    *("cosine", "mismatched", "numel", "atol", "rtol", "tolerance_used"),
    *("worst", "seconds"),
    *("error_map", "oracle", "divergence", "agreement", "place", "traceback"),
]


@pytest.fixture(scope="module")
def whole_check(snap: Snap) -> Run:
    """One check of everything, as the README has it."""
    return snap("check", "--fms-path", CHECKOUT.relative_to(ROOT), "--json", "-")


def run_candidate(snap: Snap, name: str, *options: object) -> Run:
    """Check one of the tests' candidates on the one-image case."""
    spec = f"tests.candidates:{name}"
    return snap("check", "--candidate", spec, "--case", "one-image", "--json", "-", *options)


def verdicts(run: Run) -> dict[str, set[str]]:
    """Return the verdicts of each phase."""
    found: dict[str, set[str]] = {}
    for result in run.report["results"]:
        found.setdefault(result["phase"], set()).add(result["verdict"])
    return found


def test_a_correct_port_passes_every_phase_of_every_case(whole_check: Run) -> None:
    """Exit 0, nothing failed, nothing skipped, and every case has all phases that it can have."""
    report = whole_check.report
    assert (whole_check.code, report["verdict"], report["first_divergence"]) == (0, "pass", None)
    assert {result["verdict"] for result in report["results"]} == {"pass"}
    cases: dict[str, list[str]] = {}
    for result in report["results"]:
        phases = cases.setdefault(result["case"], [])
        phases += [result["phase"]] if result["phase"] not in phases else []
    assert len(cases) == 14
    assert cases["one-image"] == cases["two-images"] == PHASES
    # A case without images has nothing to preprocess, encode or connect.
    assert set(map(tuple, cases.values())) == {tuple(PHASES), ("forward", "generate")}


def test_json_report_has_the_documented_fields(whole_check: Run) -> None:
    """The field names of a report are a contract."""
    report = whole_check.report
    assert report["schema"] == "snap-check/1"
    assert list(report["results"][0]) == FIGURES
    assert list(report["results"][0]["worst"]) == ["index", "expected", "actual"]
    assert report["golden"]["checkpoint"] == "local/tiny-idefics3"
    assert report["golden"]["golden_version"] >= 1
    tolerances = {(r["case"], r["phase"]): (r["atol"], r["rtol"]) for r in report["results"]}
    assert tolerances["one-image", "forward"] == (5e-5, 5e-5)
    assert tolerances["two-images", "forward"] == (7e-5, 7e-5)
    assert tolerances["one-image", "preprocessing"] == (1e-6, 0)


def test_report_says_which_fms_ran_and_that_transformers_did_not(whole_check: Run) -> None:
    """Path, commit and state of the checkout, not the version of some installed FMS."""
    environment = whole_check.report["environment"]
    head = subprocess.run(
        ["git", "-C", str(CHECKOUT), "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
        check=True,
    )
    candidate = environment["candidate"]
    assert candidate["path"] == str(CHECKOUT)
    assert (candidate["commit"], candidate["dirty"]) == (head.stdout.strip(), False)
    assert candidate["version"] == ""
    assert environment["transformers_importable"] is False
    assert environment["transformers_imported"] is False


def test_text_report_shows_a_verdict_per_case_and_phase(snap: Snap) -> None:
    """The grid is what a person reads first."""
    run = snap("check", "--fms-path", CHECKOUT, "--case", "*-image*")
    assert run.code == 0
    assert "transformers  never imported (not installed here)" in run.out
    rows = {line.split()[0]: line for line in run.out.splitlines() if line}
    assert rows["one-image"].count("pass") == rows["two-images"].count("pass") == 5
    assert run.out.splitlines()[-1].startswith("PASS: ")
    lines = [line for line in run.out.splitlines()[5:] if not line.startswith("warning")]
    assert max(map(len, lines)) <= 80
    assert run.err == ""


def test_a_candidate_that_raises_is_an_error_of_that_phase_alone(snap: Snap) -> None:
    """The other phases still run, message and place are kept, and the run does not pass."""
    run = run_candidate(snap, "Raises")
    assert run.code == 1
    assert verdicts(run)["connector"] == {"error"}
    assert verdicts(run)["vision"] == verdicts(run)["generate"] == {"pass"}
    (result,) = [r for r in run.report["results"] if r["verdict"] == "error"]
    assert result["reason"].startswith("RuntimeError: no connector for 17 tiles, at ")
    place = result["place"]
    assert (place["file"], place["name"]) == ("tests/candidates.py", "Raises.connector")
    raising = (ROOT / place["file"]).read_text(encoding="utf-8").splitlines()[place["line"] - 1]
    assert "raise RuntimeError" in raising
    assert raising.strip() in result["traceback"]


def test_nan_is_a_failure_by_name(snap: Snap) -> None:
    """One NaN among the logits fails the phase, and the report stays valid JSON."""
    run = run_candidate(snap, "ReturnsNan")
    assert run.code == 1
    result = next(r for r in run.report["results"] if r["verdict"] == "fail")
    assert "1 NaN" in result["reason"]
    assert result["worst"]["index"] == [3]
    assert (result["worst"]["actual"], result["max_abs"]) == ("nan", "nan")
    assert run.report["first_divergence"]["phase"] == "forward"


def test_a_wrong_shape_is_a_failure_by_name(snap: Snap) -> None:
    """A shape that broadcasts is still a wrong shape."""
    run = run_candidate(snap, "WrongShape", "--phase", "forward")
    assert run.code == 1
    assert "shape mismatch: expected (1, 123, 480), actual (1, 480)" in run.out


def test_a_wrong_type_is_a_failure_by_name(snap: Snap) -> None:
    """Another dtype, or no tensor at all, is named; close values do not help."""
    run = run_candidate(snap, "WrongType", "--phase", "connector", "--phase", "forward")
    assert run.code == 1
    reasons = [result["reason"] for result in run.report["results"]]
    assert reasons == [
        "dtype mismatch: expected torch.float32, actual torch.float64",
        "expected a tensor, actual is list",
    ]


def test_a_shorter_generation_fails_and_says_where_it_ends(snap: Snap) -> None:
    """Equal tokens are not enough: all of them must be there."""
    run = run_candidate(snap, "StopsEarly", "--phase", "generate")
    assert run.code == 1
    assert "first other token at step 10: expected " in run.out
    assert "actual nothing (it has ended) (real divergence)" in run.out


def test_another_token_is_told_with_the_goldens_margin(snap: Snap) -> None:
    """Step, both tokens as text, margins on both sides, rounding there: no near-tie."""
    from safetensors.torch import load_file
    from tokenizers import Tokenizer

    kept = load_file(set_folder(GOLDENS) / "generate.safetensors")
    values, ids = (kept[f"one-image/step_topk_{name}"][4] for name in ("values", "ids"))
    run = run_candidate(snap, "TakesSecondBest", "--phase", "generate")
    assert run.code == 1
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    (result,) = run.report["results"]
    found = result["divergence"]
    assert (found["step"], found["kind"]) == (4, "real")
    assert (found["expected"], found["actual"]) == (int(ids[0]), int(ids[1]))
    assert found["expected_text"] == tokenizer.decode([int(ids[0])])
    margin = float(values[0] - values[1])
    assert found["margin"] == pytest.approx(margin)
    assert found["candidate_margin"] == pytest.approx(margin, abs=1e-3)
    assert 0 < found["rounding"] < 1e-4
    assert result["reason"].startswith(f"first other token at step 4: expected {ids[0]} ")
    assert "its generation loop or cache is at fault, not its forward pass" in result["reason"]


def test_a_token_beyond_the_goldens_best_is_a_real_divergence(snap: Snap) -> None:
    """Its margin is known as a lower bound only."""
    run = run_candidate(snap, "TakesAnyToken", "--phase", "generate")
    found = run.report["results"][0]["divergence"]
    assert (found["actual"], found["kind"], found["margin"]) == (0, "real", None)
    assert found["margin_above"] > 0


def test_lacking_phases_are_skips_with_a_reason_and_never_passes(snap: Snap) -> None:
    """Skips are counted apart; `--require` turns one into exit code 3."""
    run = run_candidate(snap, "HasNoGeneration")
    assert run.code == 0
    assert verdicts(run)["forward"] == verdicts(run)["generate"] == {"skip"}
    reasons = {r["reason"] for r in run.report["results"] if r["verdict"] == "skip"}
    assert reasons == {
        "the decoder is not ported yet",
        "the candidate has no method 'generate'",
    }
    required = run_candidate(snap, "HasNoGeneration", "--require", "generate")
    assert required.code == 3
    assert required.report["unmet_requirements"] == ["generate"]


def test_nothing_but_skips_is_no_success(snap: Snap) -> None:
    """A run that compared nothing exits with 3."""
    run = run_candidate(snap, "HasNoGeneration", "--phase", "generate")
    assert (run.code, run.report["verdict"]) == (3, "skip")


def test_a_phase_that_no_selected_case_has_is_no_success(snap: Snap) -> None:
    """Vision of a text-only case compares nothing, and says so."""
    text_only = ("--case", "variant-02", "--phase", "vision")
    run = snap("check", "--fms-path", CHECKOUT, *text_only, "--json", "-")
    assert (run.code, run.report["verdict"]) == (3, "skip")
    assert run.report["results"][0]["reason"] == "no selected case has this phase"


def test_tolerances_can_be_replaced(snap: Snap) -> None:
    """--atol and --rtol judge in the golden's place; zero leaves no room for rounding."""
    options = ("--fms-path", CHECKOUT, "--case", "one-image", "--phase", "vision", "--json", "-")
    strict = snap("check", *options, "--atol", 0, "--rtol", 0)
    assert strict.code == 1
    assert strict.report["results"][0]["atol"] == 0
    assert snap("check", *options, "--atol", 1e-4, "--rtol", 0).code == 0


def pairs(run: Run) -> set[tuple[str, str]]:
    """Return the cases and phases of a report that were compared."""
    results = run.report["results"]
    return {(r["case"], r["phase"]) for r in results if r["verdict"] != "skip"}


RAISES = ("check", "--candidate", "tests.candidates:Raises", "--phase", "vision,connector")


def test_fail_fast_stops_at_the_first_failure(snap: Snap) -> None:
    """The cases after it do not run, which the report says."""
    run = snap(*RAISES, "-x", "--json", "-")
    assert run.code == 1
    assert pairs(run) == {("one-image", "vision"), ("one-image", "connector")}
    assert any("left out (--fail-fast)" in warning for warning in run.report["warnings"])


def test_what_failed_last_is_checked_again_alone(
    snap: Snap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until nothing fails; then everything runs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cases = ("--case", "one-image,variant-03", "--json", "-")
    assert len(pairs(snap(*RAISES, *cases))) > 1
    good = ("check", "--fms-path", CHECKOUT, "--phase", "vision,connector", *cases)
    again = snap(*good, "--last-failed")
    assert again.code == 0
    assert {phase for _, phase in pairs(again)} == {"connector"}
    assert len(pairs(snap(*good, "--last-failed"))) > 1


def test_quiet_prints_the_last_line_alone(snap: Snap) -> None:
    """Nothing else on either stream."""
    options = ("--case", "one-image", "--phase", "connector")
    run = snap("check", "--fms-path", CHECKOUT, *options, "--quiet")
    assert run.err == ""
    (line,) = run.out.splitlines()
    assert line.startswith("PASS")


def test_preprocessing_alone_needs_no_weights(snap: Snap, goldens_copy: Path) -> None:
    """A checkpoint without them is whole for it; other phases refuse it."""
    (goldens_copy.parent / CHECKPOINT.relative_to(ROOT) / "model.safetensors").unlink()
    options = ("--fms-path", CHECKOUT, "--goldens", goldens_copy, "--json", "-")
    assert snap("check", *options, "--phase", "preprocessing").report["verdict"] == "pass"
    assert snap("check", *options, "--phase", "preprocessing,vision").code == 3


def test_cases_and_phases_are_repeated_or_separated_by_commas(snap: Snap) -> None:
    """None of them replaces another."""
    cases = ("--case", "one-image", "--case", "variant-03,two-*")
    phases = ("--phase", "connector,generate", "--phase", "connector")
    run = snap("check", "--fms-path", CHECKOUT, *cases, *phases, "--json", "-")
    found = [(result["case"], result["phase"]) for result in run.report["results"]]
    assert [case for case, phase in found if phase == "generate"] == [
        "one-image", "two-images", "variant-03"
    ]  # fmt: skip
    assert {phase for _, phase in found} == {"connector", "generate"}


@pytest.mark.parametrize(
    ("options", "code", "problem"),
    [
        (
            ["--goldens", "nowhere", "--json", "/no/where"],  # before anything is looked for
            3,
            "cannot write /no/where: No such file or directory",
        ),
        (["--case", "nothing*"], 2, "--case nothing* matches none of the 14 cases"),
        (["--case", "one-image,varant-01"], 2, "did you mean variant-01"),
        (["--phase", "forward", "--phase", "visoin"], 2, "did you mean vision?"),
        (
            [
                "--goldens",
                "tests/families/goldens",
                "--checkpoint",
                "local/roberta",
                "--phase",
                "forward,vision",
            ],
            2,
            "roberta has no such phase",
        ),
        (["--candidate", "nonsense"], 2, "is none of 'fms', 'module:factory'"),
        (
            ["--candidate", "no_such:thing"],
            3,
            "cannot be imported: ModuleNotFoundError: No module named 'no_such'",
        ),
        (["--candidate", "tests.candidates:Nothing"], 3, "has no attribute 'Nothing'"),
        (["--candidate", "tests.candidates:refuses"], 3, "ValueError: cannot build on cpu"),
        (["--device", "cuda"], 3, "finds no GPU"),
        (["--revision", "abc"], 3, "no golden for any checkpoint at abc (cpu)"),
        (["--goldens", "nowhere"], 3, "no golden set at all"),
        (["--fms-path", "docs"], 3, "docs is not an FMS checkout: it has no fms/__init__.py"),
        (["--fms-path", "build/fms-checkout/fms"], 3, "give the folder that holds fms/"),
        (["--checkpoint", "/nowhere"], 3, "checkpoint /nowhere is neither a folder"),
        (["--checkpoint", "docs"], 3, "checkpoint docs has no config.json"),
        ([], 3, "has no idefics3"),
    ],
)
def test_what_cannot_run_says_why_in_two_lines(
    snap: Snap, options: list[str], code: int, problem: str
) -> None:
    """Every wrong turn has its exit code and one clear message, never a traceback."""
    run = snap("check", *options)
    assert run.code == code
    assert problem in run.err
    if code == 3:
        error_lines(run)


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ("raise MemoryError", "not enough memory"),
        ("1 / 0", "cannot be imported: ZeroDivisionError: division by zero, at {models}:1 in"),
        ("import transformers", "check it in the record environment"),
    ],
)
def test_an_fms_that_cannot_be_imported_says_whose_fault_it_is(
    snap: Snap, tmp_path: Path, fault: str, problem: str
) -> None:
    """The checkout's, or the machine's."""
    models = tmp_path / "fms" / "models"
    models.mkdir(parents=True)
    (tmp_path / "fms" / "__init__.py").touch()
    (models / "__init__.py").write_text(fault, encoding="utf-8")
    run = snap("check", "--fms-path", tmp_path)
    assert run.code == 3
    assert problem.format(models=models / "__init__.py") in "\n".join(error_lines(run))


def test_a_checkpoint_whose_files_changed_is_refused(snap: Snap, goldens_copy: Path) -> None:
    """The file is named before anything runs."""
    config = goldens_copy.parent / CHECKPOINT.relative_to(ROOT) / "config.json"
    config.write_text(config.read_text(encoding="utf-8") + " ", encoding="utf-8")
    run = snap("check", "--fms-path", CHECKOUT, "--goldens", goldens_copy)
    assert run.code == 3
    assert f"{config} has changed since local/tiny-idefics3 was recorded" in error_lines(run)[0]


def test_a_copy_of_the_checkpoint_elsewhere_can_be_checked(snap: Snap, tmp_path: Path) -> None:
    """Digests decide what a folder is, not its name."""
    shutil.copytree(CHECKPOINT, tmp_path / "renamed")
    run = snap(
        "check", "--fms-path", CHECKOUT, "--checkpoint", tmp_path / "renamed",
        "--case", "one-image", "--phase", "connector",
    )  # fmt: skip
    assert run.code == 0


def test_a_golden_of_another_device_is_used_only_when_asked_for(
    snap: Snap, goldens_copy: Path
) -> None:
    """And the report says that it was recorded elsewhere."""
    folder = next(goldens_copy.glob("*/*/cpu-float32"))
    moved = folder.rename(folder.with_name("cuda-float32"))
    manifest = moved / "manifest.json"
    text = manifest.read_text(encoding="utf-8").replace('"device": "cpu"', '"device": "cuda"')
    manifest.write_text(text, encoding="utf-8")
    options = ("--fms-path", CHECKOUT, "--goldens", goldens_copy, "--phase", "connector")
    refused = snap("check", *options)
    assert refused.code == 3
    assert "one recorded on cuda" in error_lines(refused)[0]
    assert error_lines(refused)[1].strip() == "to check on cpu against it: --golden-device cuda"
    allowed = snap("check", *options, "--golden-device", "cuda")
    assert allowed.code == 0
    assert "golden set recorded on cuda" in allowed.out


def test_quick_verifies_the_whole_generation_in_one_pass(snap: Snap) -> None:
    """Of every case; without calling generate, and saying so."""
    options = ("--phase", "generate", "--quick", "--json", "-")
    run = snap("check", "--fms-path", CHECKOUT, *options)
    assert (run.code, run.report["verdict"], run.report["quick"]) == (0, "pass", True)
    assert len(run.report["results"]) == 14
    # It generates wrongly, and its logits are right: only the steps themselves would show that.
    assert run_candidate(snap, "StopsEarly", "--phase", "generate").code == 1
    assert run_candidate(snap, "StopsEarly", "--phase", "generate", "--quick").code == 0
    text = snap("check", "--fms-path", CHECKOUT, "--case", "one-image", "--quick").out
    assert "\ngenerate      verified in one pass, without the cache (--quick)\n" in text


def test_quick_finds_wrong_logits(snap: Snap) -> None:
    """NaN, another shape, a lacking forward: fail, fail, skip."""
    nan = run_candidate(snap, "ReturnsNan", "--phase", "generate", "--quick")
    assert nan.code == 1
    assert "first other token at step 19: " in nan.report["results"][0]["reason"]
    shape = run_candidate(snap, "WrongShape", "--phase", "generate", "--quick")
    assert "forward did not return logits of each token" in shape.report["results"][0]["reason"]
    assert run_candidate(snap, "HasNoGeneration", "--phase", "generate", "--quick").code == 3


MARK = "the candidate's code ran"


@pytest.fixture
def fms(tmp_path: Path) -> Path:
    """Lay out an FMS that says on standard error that it was imported."""
    package = tmp_path / "checkout" / "fms"
    package.mkdir(parents=True)
    text = f"import sys; print({MARK!r}, file=sys.stderr)\n"
    (package / "__init__.py").write_text(text, encoding="utf-8")
    return package.parent


def refuse(snap: Snap, goldens: Path, fms: Path) -> str:
    """Check the FMS against a golden set; return what was said."""
    run = snap("check", "--goldens", goldens, "--fms-path", fms)
    assert run.code == 3
    return run.err


def test_an_fms_is_imported_after_golden_and_checkpoint_are_verified(
    snap: Snap, goldens_copy: Path, fms: Path
) -> None:
    """A damaged golden set, or another checkpoint, ends the check before it."""
    assert MARK in refuse(snap, goldens_copy, fms)
    weights = goldens_copy.parent / CHECKPOINT.relative_to(ROOT) / "config.json"
    original = weights.read_text(encoding="utf-8")
    weights.write_text(original + " ", encoding="utf-8")
    assert MARK not in refuse(snap, goldens_copy, fms)
    weights.write_text(original, encoding="utf-8")
    taps = set_folder(goldens_copy) / "taps.safetensors"
    taps.write_bytes(taps.read_bytes()[:-1] + b"?")
    assert MARK not in refuse(snap, goldens_copy, fms)
