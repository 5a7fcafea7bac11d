"""`snap check --shard` and `snap merge`: several jobs check the cases, one report comes of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from snapshot_tool.base.errors import SnapError, UsageError
from snapshot_tool.base.protocol import Phase
from snapshot_tool.base.report import CheckReport, Share, WeightReport, parse_share
from snapshot_tool.base.results import Result, Verdict
from snapshot_tool.check.shards import merge_reports
from snapshot_tool.reports.json import read_run
from tests.conftest import CHECKOUT, Snap, error_lines
from tests.mutants.corpus import edit_of
from tests.mutants.mutant import plant

OPTIONS = (
    *("--candidate", "tests.candidates:UnnamedAndFaulty", "--case", "*[0-5eo]"),
    *("--phase", "vision", "--phase", "forward", "--require", "vision"),
)


@pytest.fixture(scope="module")
def shards(snap: Snap, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Check a port with a fault in three shards."""
    folder = tmp_path_factory.mktemp("shards")
    files = [folder / f"{index}.json" for index in (1, 2, 3)]
    for index, file in enumerate(files, 1):
        assert snap("check", *OPTIONS, "--shard", f"{index}/3", "--json", file).code == 1
    return files


def merge(files: list[Path]) -> CheckReport:
    """Merge reports as `snap merge` does."""
    return merge_reports([(str(file), read_run(file)) for file in files])


def without_seconds(report: Any) -> Any:
    """Leave out what no two runs have in common."""
    del report["seconds"], report["date"]
    for result in report["results"]:
        del result["seconds"]
    return report


def test_the_merged_report_is_that_of_one_process(
    snap: Snap, shards: list[Path], tmp_path: Path
) -> None:
    """Every figure, the first divergence and its module, the exit code and the text."""
    whole = snap("check", *OPTIONS, "--json", tmp_path / "whole.json")
    merged = snap("merge", *reversed(shards), "--json", tmp_path / "merged.json")
    assert merged.code == whole.code == 1
    assert merged.out == whole.out
    reports = [json.loads((tmp_path / f"{n}.json").read_text()) for n in ("whole", "merged")]
    assert reports[0]["first_divergence"]["module"]
    assert without_seconds(reports[0]) == without_seconds(reports[1])


def test_shards_explore_their_own_cases_and_all_questions_are_merged(
    snap: Snap, tmp_path: Path
) -> None:
    """What one of them finds, on none but its cases, is in the merged report and its exit code."""
    plant(edit_of("padding-ignored"), checkout=CHECKOUT, out=tmp_path / "checkout")
    options = ("--fms-path", tmp_path / "checkout", "--case", "*-image*", "--phase", "forward")
    files = [tmp_path / f"{index}.json" for index in (1, 2)]
    runs = [
        snap("check", *options, "--explore", 6, "--shard", f"{index}/2", "--json", file)
        for index, file in enumerate(files, 1)
    ]
    assert [run.code for run in runs] == [1, 1]
    shards = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    for shard, case in zip(shards, ("one-image", "two-images"), strict=True):
        asked = {result["tensor"] for result in shard["results"] if ":" in result["tensor"]}
        assert asked
        assert all(case in question for question in asked)
    merged = snap("merge", *files, "--json", tmp_path / "merged.json")
    assert merged.code == 1
    exploration = json.loads((tmp_path / "merged.json").read_text(encoding="utf-8"))["exploration"]
    assert exploration["asked"] == sum(shard["exploration"]["asked"] for shard in shards)
    (padding,) = (kind for kind in exploration["kinds"] if kind["kind"] == "padding")
    assert padding["verdict"] == "fail"
    assert padding["smallest_failure"].startswith("padding:one-image@")


def test_the_report_of_a_shard_says_which_it_is(snap: Snap, shards: list[Path]) -> None:
    """On paper and in its JSON; it has its own cases alone."""
    shown = snap("report", shards[1]).out
    entry = json.loads(shards[1].read_text())["shard"]
    assert f"shard         2 of 3, {len(entry['cases'])} of {entry['all_cases']} cases" in shown
    results = json.loads(shards[1].read_text())["results"]
    assert {result["case"] for result in results} <= set(entry["cases"])
    assert (entry["index"], entry["count"]) == (2, 3)


def test_a_missing_and_a_doubled_shard_are_named(snap: Snap, shards: list[Path]) -> None:
    """A verdict on a part of the cases is none."""
    missing = snap("merge", shards[0], shards[2])
    assert missing.code == 3
    assert "missing shards: 2/3" in error_lines(missing)[0]
    with pytest.raises(SnapError, match=f"shard 3/3 is duplicate: {shards[2]}"):
        merge([*shards, shards[2]])


@pytest.mark.parametrize(
    ("field", "what"),
    [
        (("golden", "golden_version"), "golden set"),
        (("environment", "candidate", "version"), "candidate"),
        (("dtype",), "dtype"),
        (("shard", "asked", "--atol"), "--atol"),
        (("shard", "all_cases"), "number of all cases"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_shards_of_two_checks_are_not_merged(
    shards: list[Path], tmp_path: Path, field: tuple[str, ...], what: str
) -> None:
    """Another golden, candidate or option: the message names which."""
    report = entry = json.loads(shards[2].read_text())
    for name in field[:-1]:
        entry = entry[name]
    entry[field[-1]] = 7 if isinstance(entry[field[-1]], int) else "7"
    other = tmp_path / "other.json"
    other.write_text(json.dumps(report))
    with pytest.raises(SnapError, match=f"belong to different checks: the {what} is"):
        merge([*shards[:2], other])


def test_a_phase_that_one_shard_lacks_is_judged_by_the_others(shards: list[Path]) -> None:
    """A shard of text cases alone skips vision; the whole check neither skips nor lacks it."""
    reports = [read_run(path) for path in shards]
    nothing = Result("*", Phase.VISION, "", Verdict.SKIP, "no selected case has anything")
    text = tuple(r for r in reports[1].results if r.phase is not Phase.VISION)
    one = replace(reports[1], results=(*text, nothing), unmet=(Phase.VISION,))
    merged = merge_reports([("1", reports[0]), ("2", one), ("3", reports[2])])
    assert merged.unmet == ()
    assert not [r for r in merged.results if r.verdict is Verdict.SKIP]
    bare = [
        replace(
            r,
            results=(*(x for x in r.results if x.phase is not Phase.VISION), nothing),
            unmet=(Phase.VISION,),
        )
        for r in reports
    ]
    merged = merge_reports([("1", bare[0]), ("2", bare[1]), ("3", bare[2])])
    assert merged.unmet == (Phase.VISION,)
    assert len([r for r in merged.results if r.verdict is Verdict.SKIP]) == 1


@pytest.mark.parametrize("harmful", [("head.weight",), None])
def test_an_unset_weight_that_one_shard_uses_is_used(
    shards: list[Path], harmful: tuple[str, ...] | None
) -> None:
    """It is unused in the others, whose cases do not reach it."""
    reports = [(str(file), read_run(file)) for file in shards]
    for index, (file, report) in enumerate(reports):
        weights = WeightReport(9, unset=("head.weight",), harmful=harmful if index == 1 else ())
        reports[index] = (file, replace(report, weights=weights))
    merged = merge_reports(reports).weights
    assert merged is not None
    assert merged.harmful == harmful


def test_a_whole_report_is_no_shard(shards: list[Path]) -> None:
    """Merged once, it is not merged again."""
    whole = merge(shards)
    with pytest.raises(SnapError, match="of a whole check, not of a shard"):
        merge_reports([("whole.json", whole)])


@pytest.mark.parametrize("share", ["0/3", "4/3", "1", "1/0", "a/b"])
def test_a_share_that_cannot_be_is_refused(share: str) -> None:
    """Shares are numbered from 1."""
    with pytest.raises(UsageError, match=f"invalid --shard {share}"):
        parse_share(share)


def test_every_case_is_in_one_share() -> None:
    """Dealt out: sizes differ by one at most."""
    items = list(range(14))
    dealt = [Share(index, 4).of(items) for index in range(1, 5)]
    assert sorted(item for share in dealt for item in share) == items
    assert {len(share) for share in dealt} == {3, 4}
