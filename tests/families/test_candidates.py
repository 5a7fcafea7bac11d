"""Candidates that are not FMS: the documented example, and factories found by entry point."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import ROOT, Snap, error_lines

FOLDER = Path(__file__).parent
GOLDEN = ("--goldens", FOLDER / "goldens", "--checkpoint", FOLDER / "checkpoints" / "llama")


@pytest.mark.parametrize(
    ("page", "file"),
    [
        ("candidates.md", "plain_llama.py"),
        ("adding-a-family.md", "xlm_roberta.py"),
        ("tutorial.md", "first_port.py"),
    ],
)
def test_a_page_shows_its_example_as_it_is(page: str, file: str) -> None:
    """The file that the tests record and check with."""
    text = (ROOT / "docs" / page).read_text("utf-8")
    (shown,) = re.findall(r"(?ms)^```python\n(.*?)^```", text)
    assert shown == (ROOT / "tests" / "examples" / file).read_text("utf-8")


def test_the_example_passes_and_without_quick_lacks_generation(snap: Snap) -> None:
    """It has forward: all logits pass; generation is a skip that says why."""
    run = snap("check", *GOLDEN, "--candidate", "tests.examples.plain_llama:Llama", "--json", "-")
    assert run.code == 0
    results = {(r["phase"], r["verdict"], r["reason"]) for r in run.report["results"]}
    assert ("forward", "pass", "") in results
    assert ("generate", "skip", "the candidate has no method 'generate'") in results


def test_an_entry_point_names_a_candidate(
    snap: Snap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package that is installed offers its factory in the group snapshot_tool.candidates."""
    metadata = tmp_path / "offers_llama-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: offers-llama\nVersion: 1.0\n")
    entry = "[snapshot_tool.candidates]\nplain-llama = tests.examples.plain_llama:Llama\n"
    (metadata / "entry_points.txt").write_text(entry)
    monkeypatch.syspath_prepend(tmp_path)
    run = snap("check", *GOLDEN, "--candidate", "plain-llama", "--quick")
    assert run.code == 0, run.err
    unknown = snap("check", *GOLDEN, "--candidate", "other")
    assert unknown.code == 2
    assert "is none of 'fms', 'plain-llama', 'module:factory'" in error_lines(unknown)[0]
