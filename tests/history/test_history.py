"""docs/history.md: what counts as found, as named and as mended."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from tests.conftest import ROOT
from tests.families.versions import Outcome as ReleaseOutcome
from tests.history.run import PASS, REFUSED, RELEASES, Outcome, Row, page, read_fixes
from tests.mutants.report import interval

FIX = replace(read_fixes()[0], commit="0a", place=r"attn\.q_proj", left="", missed="")
FAILS = Outcome("**forward** 3/9 `attn.q_proj`", "attn.q_proj; 9 of 9 differ", 3)
OTHERWISE = Outcome("**forward** 3/9 `mlp`", "mlp; 9 of 9 differ", 3)
PASSES = Outcome(PASS)


def row(before: Outcome, after: Outcome = PASSES, **fields: Any) -> Row:
    """Return a fix with what was found."""
    return Row(replace(FIX, **fields), "2026-01-01", before, after)


def test_a_refusal_counts_only_for_the_fault() -> None:
    """A parent that is refused for another reason is missed, and so is one that passes."""
    refused = row(Outcome(REFUSED, "attn.q_proj is (8, 4), not (4, 8)"))
    assert refused.found
    assert refused.named
    assert not row(Outcome(REFUSED, "no module named triton")).found
    assert not row(PASSES).found


def test_a_failure_with_another_place_is_found_but_not_named() -> None:
    """Any failure counts as found."""
    assert row(OTHERWISE).found
    assert not row(OTHERWISE).named


def test_a_fix_that_fails_as_before_is_not_excused() -> None:
    """The other fault has to be declared, and the result another one."""
    assert not row(FAILS, FAILS, left="another fault").other_fault
    assert not row(FAILS, OTHERWISE).other_fault
    assert row(FAILS, OTHERWISE, left="another fault").other_fault
    assert row(OTHERWISE, OTHERWISE, left="another fault").other_fault


def test_the_page_counts_and_lists_every_miss() -> None:
    """Misses stand with their reasons."""
    rows = [row(FAILS), row(FAILS, FAILS), row(OTHERWISE, missed="two faults", commit="0b")]
    text = page(rows, {"llama": [ReleaseOutcome(PASS)] * len(RELEASES)})
    assert f"3 of 3 ({interval(3, 3)}) parents fail" in text
    assert f"2 of 3 ({interval(2, 3)}) of those are named right" in text
    assert f"1 of 3 ({interval(1, 3)}) fixes differ by what they mend: 2 pass" in text
    assert re.search(r"\*\*0b\*\*: two faults", text)


def test_another_fault_of_the_parent_is_counted_by_itself() -> None:
    """If the place that is named is that of the fault which another fix mends."""
    fix = row(Outcome("**forward** 3/9 `mlp`", "mlp", 3), commit="0c", place="mlp")
    for other, count in (("0c", 1), ("0a", 0), ("", 0)):
        both = [row(FAILS), fix, row(OTHERWISE, missed="two faults", commit="0b", other=other)]
        text = page(both, {"llama": [ReleaseOutcome(PASS)] * len(RELEASES)})
        assert f"2 of 3 ({interval(2, 3)}) of those are named right" in text
        assert f"Of the others, {count} are named by another fault" in text


def test_each_commit_is_declared_once_and_stands_on_the_page() -> None:
    """With the date, so that a stale page shows."""
    fixes = read_fixes()
    assert len({fix.commit for fix in fixes}) == len(fixes) >= 30
    text = (ROOT / "docs" / "history.md").read_text("utf-8")
    for fix in fixes:
        re.compile(fix.place)
        assert f"| {fix.commit} | 20" in text
