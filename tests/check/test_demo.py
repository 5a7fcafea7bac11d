"""`snap demo`: the embedded golden set, its ports, and what is shown."""

from __future__ import annotations

import filecmp
import json
from pathlib import Path

from click.testing import CliRunner

from snapshot_tool import demo
from snapshot_tool.cli.commands import cli
from tests.conftest import ROOT

DATA = Path(demo.__file__).parent
RECORDED = ROOT / "tests" / "families"


def test_the_right_port_passes_and_the_fault_in_the_other_is_named(tmp_path: Path) -> None:
    """The command succeeds in both cases, and the report is of the second."""
    done = CliRunner().invoke(cli, ["demo", "--out", str(tmp_path / "demo")])
    assert done.exit_code == 0, done.output
    right, wrong = done.output.split("demo.port:Wrong", 1)
    assert "PASS" in right
    assert "FAIL" not in right
    assert "FAIL" in wrong
    report = json.loads((tmp_path / "demo" / "report.json").read_text(encoding="utf-8"))
    assert report["localisation"]["culprit"] == "model.layers.0.mlp.act_fn"
    assert (tmp_path / "demo" / "report.html").stat().st_size > 0


def test_the_embedded_files_are_those_that_were_recorded() -> None:
    """The golden set in the package is the tests' one of Llama, which transformers computed."""
    for embedded, original in (
        (DATA / "checkpoint", RECORDED / "checkpoints" / "llama"),
        (DATA / "goldens" / "local--llama", RECORDED / "goldens" / "local--llama"),
    ):
        names = [str(p.relative_to(original)) for p in original.rglob("*") if p.is_file()]
        same, *different = filecmp.cmpfiles(embedded, original, names, shallow=False)
        assert same
        assert different == [[], []]
