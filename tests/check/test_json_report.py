"""The JSON report: as its schema says, read back without loss, and as it is stored.

The stored reports are in tests/check/expected, with figures and this machine's facts left out.
UPDATE_EXPECTED=1 writes them again.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from subprocess import run as run_process
from typing import Any

import jsonschema
import pytest
from click.testing import CliRunner

from snapshot_tool.base.errors import SnapError
from snapshot_tool.base.options import options_of
from snapshot_tool.base.report import CheckReport, Graft, WeightDifference, WeightReport
from snapshot_tool.base.results import Judgement, Verdict, Worst
from snapshot_tool.check.request import CheckRequest
from snapshot_tool.cli.check import check_command
from snapshot_tool.cli.commands import cli
from snapshot_tool.reports.json import read_run, run_to_json
from tests.conftest import CHECKOUT, ROOT, Snap
from tests.schema import PATH, schema_text

EXPECTED = Path(__file__).parent / "expected"
OPTIONS = {
    "pass": ("--fms-path", CHECKOUT.relative_to(ROOT), "--phase", "connector", "--localise"),
    "fail": ("--candidate", "tests.candidates:TakesSecondBest", "--phase", "generate"),
    "error": ("--candidate", "tests.candidates:RaisesInForward", "--phase", "forward"),
    "half": ("--fms-path", CHECKOUT.relative_to(ROOT), "--phase", "forward", "--dtype", "bfloat16"),
}
# The largest of many rounding differences stands elsewhere on another processor.
VARYING = (
    "snap",
    "date",
    "command",
    "traceback",
    "line",
    "warnings",
    "recorded_elsewhere",
    "commit",
    "version",
    "modules",
    "unset",
    "position",
    "index",
)
NUMBER = re.compile(r"(?<![\w.-])-?\d+(\.\d+)?(e[+-]\d+)?(?![\w.])")


@pytest.fixture(scope="module", params=sorted(OPTIONS))
def written(
    request: pytest.FixtureRequest, snap: Snap, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Check one case; return the file that was written, with the printed text beside it."""
    path: Path = tmp_path_factory.mktemp("run") / f"{request.param}.json"
    run = snap("check", *OPTIONS[request.param], "--case", "one-image", "--json", path)
    path.with_suffix(".out").write_text(run.out, encoding="utf-8")
    return path


def printed(path: Path) -> str:
    """Return what `snap report` prints of a file."""
    return CliRunner().invoke(cli, ["report", str(path)], env={"COLUMNS": "80"}).output


def without_figures(value: Any, name: str = "") -> Any:
    """Leave out of a report what another processor or another day makes different."""
    if name == "environment":
        return sorted(value)
    if name in VARYING:
        return f"({type(value).__name__})"
    if isinstance(value, dict):
        return {key: without_figures(item, key) for key, item in value.items()}
    if isinstance(value, list):
        return [without_figures(item) for item in value]
    if isinstance(value, float):
        return "(figure)"
    return NUMBER.sub("#", value) if name in ("reason", "text") else value


def require_stored(name: str, text: str) -> None:
    """Compare a text with the stored one."""
    path = EXPECTED / name
    if os.environ.get("UPDATE_EXPECTED"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def test_the_json_is_the_stored_one(written: Path) -> None:
    """Every field, verdict, reason and name."""
    report = without_figures(json.loads(written.read_text(encoding="utf-8")))
    require_stored(written.name, json.dumps(report, indent=1, ensure_ascii=False) + "\n")


def test_the_text_is_the_stored_one(written: Path) -> None:
    """As `snap report` prints it, but for figures and what is said of this machine."""
    facts = r"^(candidate|device|transformers|recorded on|warning|weights) .*\n"
    text = re.sub(facts, "", printed(written), flags=re.MULTILINE)
    text = re.sub(r"(\d[\d.e+-]*)x|equal", "#x", text)
    text = re.sub(r"(nearest to its limit is) .*", r"\1 #", text)
    text = "\n".join(re.sub(r" +", " ", line).rstrip() for line in text.splitlines())
    require_stored(f"{written.stem}.txt", NUMBER.sub("#", text) + "\n")


def test_snap_report_prints_what_the_check_printed(written: Path) -> None:
    """Figures by the oracle included, in half precision."""
    assert printed(written) == written.with_suffix(".out").read_text(encoding="utf-8")


def test_the_schema_is_up_to_date_and_describes_real_reports(written: Path) -> None:
    """`make schema` writes it from the declarations."""
    assert PATH.read_text(encoding="utf-8") == schema_text()
    schema = json.loads(PATH.read_text(encoding="utf-8"))
    report = json.loads(written.read_text(encoding="utf-8"))
    jsonschema.validate(report, schema)
    del report["results"][0]["cosine"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(report, schema)


def spoilt(report: CheckReport) -> CheckReport:
    """Return a report with odd figures, a graft and a wrong weight."""
    inf, nan = float("inf"), float("nan")
    first, *rest = report.results
    odd = replace(first, max_abs=inf, max_rel=nan, rmse=-inf, worst=Worst((1, 2), -inf, nan))
    judgement = Judgement(odd.case, odd.phase, odd.tensor, Verdict.FAIL, "differs")
    weights = WeightReport(3, (WeightDifference("a", ("model.a",), 1, 2, nan),), ("b",), ("c",))
    graft = Graft("model.a", "a", odd.case, (judgement,), (judgement,), "model.b")
    return replace(report, results=(odd, *rest), graft=graft, weights=weights)


def test_the_command_makes_the_same_request_again() -> None:
    """As a line for a shell, without defaults."""
    request = CheckRequest(case=["one image", "two"], quick=True, atol=0.5, goldens="elsewhere")
    words = shlex.split(request.command)
    assert words[:2] == ["snap", "check"]
    given = check_command.make_context("check", words[2:]).params
    fields = {name: given[name] for name in options_of(CheckRequest) if name in given}
    assert CheckRequest(**{**fields, "goldens": str(fields["goldens"])}) == request


def test_a_report_read_back_is_the_report(written: Path, tmp_path: Path) -> None:
    """Every field, NaN and infinities included."""
    text = written.read_text(encoding="utf-8")
    report = read_run(written)
    assert run_to_json(report) == text
    path = tmp_path / "odd.json"
    path.write_text(run_to_json(spoilt(report)), encoding="utf-8")
    again = read_run(path)
    assert run_to_json(again) == path.read_text(encoding="utf-8")
    assert again.graft == spoilt(report).graft
    json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    jsonschema.validate(json.loads(run_to_json(again)), json.loads(PATH.read_text()))


def test_a_report_of_an_older_version_is_read(written: Path, tmp_path: Path) -> None:
    """Fields that it lacks have defaults; fields that are not known are ignored."""
    report = json.loads(written.read_text(encoding="utf-8"))
    for name in ("coverage", "graft", "shard", "weights", "exploration", "recorded_elsewhere"):
        del report[name]
    path = tmp_path / "old.json"
    path.write_text(json.dumps({**report, "unknown": 1}), encoding="utf-8")
    assert read_run(path).results == read_run(written).results
    assert read_run(path).coverage == ()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "truncated"),
        (b"[]", "Expected `object`"),
        (b'{"schema": "snap-diff/1"}', "schema"),
        (b'{"schema": "snap-check/1"}', "missing required field"),
        (b'{"schema": "snap-check/1", "environment": {"candidate": 3}}', "Expected"),
        (b"\xff\xfe{", "not a report"),
        (b'{"x":' + b"[" * 100_000, "recursion"),
    ],
)
def test_what_is_not_a_report_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    """In one line, with how to make one."""
    path = tmp_path / "run.json"
    path.write_bytes(content)
    with pytest.raises(SnapError) as caught:
        read_run(path)
    assert "is not a report of snap check" in caught.value.problem
    assert problem in caught.value.problem
    assert "\n" not in caught.value.problem
    assert CliRunner().invoke(cli, ["report", str(path)]).exit_code != 0


def test_a_damaged_field_is_refused_by_its_path(written: Path, tmp_path: Path) -> None:
    """Also where the environment lacks what every report has."""
    path = tmp_path / "run.json"
    for field, damage in (("results", [{}]), ("environment", {}), ("golden", 7)):
        report = json.loads(written.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**report, field: damage}), encoding="utf-8")
        with pytest.raises(SnapError, match="is not a report of snap check"):
            read_run(path)


def test_reading_and_drawing_a_report_imports_no_torch(written: Path, tmp_path: Path) -> None:
    """A report is looked at in seconds, and where torch is not installed."""
    code = (
        "import sys; from click.testing import CliRunner\n"
        "from snapshot_tool.cli.commands import cli\n"
        "CliRunner().invoke(cli, sys.argv[1:]); sys.exit('torch' in sys.modules)"
    )
    page = tmp_path / "run.html"
    command = [sys.executable, "-c", code, "report", str(written), "--html", str(page)]
    assert run_process(command, cwd=ROOT, check=False).returncode == 0
    assert page.stat().st_size > 0


def test_a_finished_check_is_judged_again_without_running(written: Path, snap: Snap) -> None:
    """By its own rule it is the same report; by a tolerance of nothing it fails."""
    own = read_run(written)
    rule = snap("report", written, "--tolerance", own.rule, "--json", "-")
    assert rule.code == own.exit_code
    assert [r["verdict"] for r in rule.report["results"]] == [r.verdict for r in own.results]
    exact = ("--tolerance", "table", "--atol", 0, "--rtol", 0)
    strict = snap("report", written, *exact, "--json", "-")
    assert strict.code == 1
