"""A finished check is judged by another rule or tolerance, from its figures."""

from __future__ import annotations

import math

import pytest

from snapshot_tool.base.errors import SnapError
from snapshot_tool.base.protocol import CandidateInfo, Phase
from snapshot_tool.base.report import CheckReport, GoldenIdentity, Transformers
from snapshot_tool.base.results import Result, Verdict, Worst
from snapshot_tool.base.tolerance import OracleComparison, Rule
from snapshot_tool.judge.judge import judge_again


def result(max_abs: float, max_rel: float, worst: Worst, **changes: object) -> Result:
    """Return a vision tensor that fails by atol 1e-4 and rtol 1e-4."""
    figures = {"max_abs": max_abs, "max_rel": max_rel, "mismatched": 1, "numel": 4, "worst": worst}
    limits = {"atol": 1e-4, "rtol": 1e-4}
    return Result(
        "one",
        Phase.VISION,
        "x",
        Verdict.FAIL,
        "it differs",
        **{**figures, **limits, **changes},  # type: ignore[arg-type]
    )


FAR = result(0.02, 0.01, Worst((1,), 2.0, 2.02))
TOKENS = Result(
    "one", Phase.GENERATE, "token_ids", Verdict.PASS,
    max_abs=0.0, max_rel=0.0, mismatched=0, numel=3, atol=0.0, rtol=0.0, worst=Worst((0,), 1, 1),
)  # fmt: skip


def report_of(*results: Result, dtype: str = "float32") -> CheckReport:
    """Return a check with these results."""
    golden = GoldenIdentity("local/tiny", "0" * 64, "cpu", "float32", 1, "goldens")
    transformers = Transformers(importable=False, imported_by_candidate=False)
    return CheckReport(
        golden, "cpu", CandidateInfo("x"), transformers, {}, results, (), dtype=dtype
    )


def verdicts(report: CheckReport, **changes: float | Rule) -> list[Verdict]:
    """Return the verdicts by another rule or tolerance."""
    asked = {"rule": None, "atol": None, "rtol": None, **changes}
    return [one.verdict for one in judge_again(report, **asked).results]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("atol", "rtol", "verdict"),
    [
        (0.03, 0.0, Verdict.PASS),  # the greatest difference is within atol
        (0.01, 0.0, Verdict.FAIL),
        (0.0, 0.011, Verdict.PASS),  # the greatest relative difference is within rtol
        (0.0, 0.009, Verdict.FAIL),
        (1e-3, 1e-3, Verdict.FAIL),  # the worst element is beyond both
        (1e-4, 1e-4, Verdict.FAIL),
    ],
)
def test_another_tolerance_decides_if_the_figures_allow_it(
    atol: float, rtol: float, verdict: Verdict
) -> None:
    """Tokens keep their verdict under every tolerance."""
    found = verdicts(report_of(FAR, TOKENS), atol=atol, rtol=rtol)
    assert found == [verdict, Verdict.PASS]


def test_figures_that_do_not_decide_are_refused() -> None:
    """The worst element by the old tolerance may not be the worst by the new one."""
    with pytest.raises(SnapError, match="vision / one / x"):
        verdicts(report_of(FAR), atol=0.011, rtol=0.006)


def test_nan_fails_under_every_tolerance() -> None:
    """No tolerance allows it."""
    nan = result(math.nan, math.nan, Worst((0,), 1.0, math.nan))
    assert verdicts(report_of(nan), atol=1e9, rtol=1e9) == [Verdict.FAIL]


def test_the_oracle_and_the_table_take_each_others_place() -> None:
    """Both have kept their figures; without those of an oracle it is refused."""
    oracle = OracleComparison(1e-6, 1e-6, 2e-6, (0,), 1e-6, 1e-5)
    report = report_of(result(0.02, 0.01, FAR.worst or Worst((0,), 0, 0), oracle=oracle))
    assert verdicts(report, rule=Rule.ORACLE) == [Verdict.PASS]
    again = judge_again(report, rule=Rule.ORACLE, atol=None, rtol=None)
    assert verdicts(again, rule=Rule.TABLE) == [Verdict.FAIL]
    with pytest.raises(SnapError, match="oracle"):
        verdicts(report_of(FAR), rule=Rule.ORACLE)
    with pytest.raises(SnapError, match="float32"):
        verdicts(report_of(FAR, dtype="bfloat16"), rule=Rule.TABLE)
