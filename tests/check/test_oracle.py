"""Judging by the oracle, and in half precision, on the committed goldens and the real FMS."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import CHECKOUT, Run, Snap, error_lines, set_folder

JUDGED = {"vision", "connector", "forward"}


@pytest.fixture(scope="module")
def whole_check(snap: Snap) -> Run:
    """Check everything by the oracle, once."""
    return snap("check", "--fms-path", CHECKOUT, "--tolerance", "oracle", "--json", "-")


def test_a_correct_port_passes_by_the_oracle(whole_check: Run) -> None:
    """Every tensor of vision, connector and forward has both figures, and room to the limit."""
    failed = [r for r in whole_check.report["results"] if r["verdict"] != "pass"]
    assert (whole_check.code, failed) == (0, [])
    assert whole_check.report["tolerance"] == "oracle"
    judged = [r for r in whole_check.report["results"] if r["phase"] in JUDGED]
    assert len(judged) > 70
    for result in judged:
        figures = result["oracle"]
        assert figures["within"] is True
        assert figures["error"] < figures["limit"]
        assert figures["position_error"] < figures["position_limit"]
        assert 0 < figures["reference_error"] < 1e-5
        assert result["max_abs"] is not None


def test_phases_without_an_oracle_are_judged_by_the_table(whole_check: Run) -> None:
    """Pixel values have one right answer, token ids another."""
    others = [r for r in whole_check.report["results"] if r["phase"] not in JUDGED]
    assert {r["phase"] for r in others} == {"preprocessing", "generate"}
    assert {r["oracle"] for r in others} == {None}


def check_candidate(snap: Snap, name: str, *options: object) -> Run:
    """Check one of the tests' candidates on the one-image case."""
    spec = f"tests.candidates:{name}"
    return snap("check", "--candidate", spec, "--case", "one-image", "--json", "-", *options)


def test_the_oracle_finds_what_the_table_lets_pass(snap: Snap) -> None:
    """A weight off by 3 in 100,000; the table's report says that the oracle would see it."""
    table = check_candidate(snap, "SlightlyOff", "--phase", "forward")
    assert table.code == 0
    assert not all(r["oracle"]["within"] for r in table.report["results"])
    oracle = check_candidate(snap, "SlightlyOff", "--phase", "forward", "--tolerance", "oracle")
    assert oracle.code == 1
    reasons = [r["reason"] for r in oracle.report["results"] if r["verdict"] == "fail"]
    assert reasons
    assert all("error against the oracle is" in reason for reason in reasons)
    # Its module is named, although its error is far below what needs no oracle to be seen.
    assert oracle.report["first_divergence"]["module"] == "model.text_model.norm"


def test_one_bad_position_is_named(snap: Snap) -> None:
    """A single element that the table allows and that no mean shows."""
    options = ("--phase", "vision", "--tolerance", "oracle")
    run = check_candidate(snap, "OneBadPosition", *options)
    assert run.code == 1
    (result,) = run.report["results"]
    assert result["oracle"]["position"] == [3, 17]
    assert result["reason"].startswith("its error against the oracle at position [3, 17] is 0.000")
    assert check_candidate(snap, "OneBadPosition", "--phase", "vision").code == 0


def test_the_text_report_shows_both_figures(snap: Snap) -> None:
    """Whatever the rule, how near a tensor is to the oracle's limit."""
    run = snap("check", "--fms-path", CHECKOUT, "--case", "variant-04", "--phase", "vision")
    assert run.code == 0
    assert "oracle: nearest to its limit is vision / variant-04 / last_hidden_state:" in run.out
    assert "--tolerance oracle agrees on all" in run.out


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_judged_by_the_reference_in_that_precision(
    snap: Snap, dtype: str
) -> None:
    """A correct port in half precision passes; tokens may differ at near-ties, when allowed."""
    options = ("--fms-path", CHECKOUT, "--dtype", dtype, "--json", "-", "--allow-near-ties")
    run = snap("check", *options)
    assert run.code == 0, [r for r in run.report["results"] if r["verdict"] != "pass"]
    assert (run.report["dtype"], run.report["tolerance"]) == (dtype, "oracle")
    judged = [r for r in run.report["results"] if r["phase"] in JUDGED]
    assert all(r["oracle"]["reference_error"] > 1e-4 for r in judged)
    near_ties = [r["divergence"] for r in run.report["results"] if r["divergence"]]
    assert all(found["kind"] == "near_tie" for found in near_ties)


def test_near_ties_pass_in_half_precision_and_are_counted(snap: Snap) -> None:
    """Rounding alone may choose the other token there; the report says how often it did."""
    of_one = ("--candidate", "tests.candidates:TakesTheOtherOfTwo", "--case", "variant-12")
    options = (*of_one, "--dtype", "bfloat16", "--phase", "generate")
    run = snap("check", *options, "--json", "-")
    diverging = [r for r in run.report["results"] if r["divergence"]]
    assert run.code == 0
    assert run.report["near_ties_allowed"] is True
    assert [r["divergence"]["kind"] for r in diverging] == ["near_tie"]
    assert f"near-ties allowed: {len(diverging)}" in snap("check", *options).out.splitlines()[-1]


def test_a_real_divergence_is_never_allowed_as_a_near_tie(snap: Snap) -> None:
    """The second best token at a step where the golden is sure."""
    options = ("--phase", "generate", "--allow-near-ties")
    run = check_candidate(snap, "TakesSecondBest", *options)
    assert run.code == 1
    assert run.report["results"][0]["divergence"]["kind"] == "real"


def without_oracle(goldens: Path) -> None:
    """Take the oracle out of a set, as a recording without --oracle leaves it."""
    folder = set_folder(goldens)
    manifest: Any = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    del manifest["files"]["oracle.safetensors"]
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    (folder / "oracle.safetensors").unlink()


@pytest.mark.parametrize(
    "options",
    [("--tolerance", "oracle"), ("--dtype", "bfloat16"), ("--allow-near-ties",)],
)
def test_what_needs_an_oracle_says_so_without_one(
    snap: Snap, goldens_copy: Path, options: tuple[str, ...]
) -> None:
    """Exit 3 and the command that records it; nothing is judged by something else instead."""
    without_oracle(goldens_copy)
    run = snap("check", "--goldens", goldens_copy, "--fms-path", CHECKOUT, *options)
    assert run.code == 3
    first, second = error_lines(run)
    assert "has no oracle, which is needed for" in first
    assert second.endswith("--update --reason TEXT --oracle")


def test_without_an_oracle_a_divergence_is_called_neither(snap: Snap, goldens_copy: Path) -> None:
    """The margin alone does not tell what rounding can do."""
    without_oracle(goldens_copy)
    run = check_candidate(snap, "TakesSecondBest", "--phase", "generate", "--goldens", goldens_copy)
    assert run.code == 1
    assert run.report["results"][0]["divergence"]["kind"] == "unknown"
