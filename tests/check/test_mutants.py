"""Faults and benign changes: each fault still applies, a sample is found, none is invented."""

from __future__ import annotations

import copy
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from snapshot_tool.candidates.fms.candidate import FmsCandidate
from tests.conftest import CHECKOUT, GOLDENS, ROOT
from tests.mutants import benign as benign_module
from tests.mutants.benign import Alarms, Benign, benign_runs, run_benign
from tests.mutants.corpus import GROUPS, MUTANTS
from tests.mutants.measure import Setup
from tests.mutants.mutant import DERIVED, Change, Edit
from tests.mutants.ways import OTHER_SHAPES, WAYS, Replaced, Way

DETECTION = ROOT / "docs" / "detection.md"
SEED = 1
BENIGN = 1
SETUP = Setup(GOLDENS, CHECKOUT)
DRAWN = benign_runs(
    400, names=[name for name, way in WAYS.items() if not way.compiles and name != OTHER_SHAPES]
)


def test_every_edit_of_the_corpus_still_applies() -> None:
    """Its text is in the checkout exactly once: otherwise the mutant has to be written anew."""
    edits = {m.name: m.fault for m in MUTANTS.values() if isinstance(m.fault, Edit)}
    found = {
        name: (CHECKOUT / edit.file).read_text(encoding="utf-8").count(edit.old)
        for name, edit in edits.items()
    }
    assert found == dict.fromkeys(edits, 1)


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a model's weights, and the numbers of its modules, as an epsilon."""
    numbers = {
        f"{name}.{key}": torch.tensor(value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, float)
    }
    # Weights that the checkpoint leaves unset are NaN, which equals nothing.
    return {name: value.nan_to_num() for name, value in (model.state_dict() | numbers).items()}


def test_every_change_of_a_weight_changes_the_model(candidate: FmsCandidate) -> None:
    """The weight is there under its name, and differs afterwards."""
    changes = {m.name: m.fault for m in MUTANTS.values() if isinstance(m.fault, Change)}
    before = state(candidate.model)
    for name, change in changes.items():
        model = copy.deepcopy(candidate.model)
        change.apply(model)
        after = state(model)
        same = before.keys() == after.keys()
        assert not (same and all(torch.equal(before[key], after[key]) for key in before)), name
    assert len(changes) > 20


def test_names_are_unique() -> None:
    """Two mutants of one name would hide each other."""
    assert len(MUTANTS) == sum(map(len, GROUPS.values()))


def test_the_report_is_about_every_mutant() -> None:
    """A mutant that was added needs `make mutants`."""
    page, _, _ = DETECTION.read_text(encoding="utf-8").partition("## First found by")
    counts = dict(re.findall(r"^\| ([a-z-]+) \| (\d+) \|", page, re.MULTILINE))
    expected = {group: str(len(mutants)) for group, mutants in GROUPS.items()}
    assert counts.items() >= {**expected, "all": str(len(MUTANTS))}.items()


def test_the_readme_has_the_figures_of_the_report() -> None:
    """For each rule that it names: found, named, false alarms."""
    page = DETECTION.read_text(encoding="utf-8").partition("## The rules of other projects")[2]
    readme = (ROOT / "README.md").read_text(encoding="utf-8").partition("| rule |")[2]
    figures = {}
    for line in page.splitlines():
        if found := re.match(r"\| (?:\[|\*\*)([^]*]+)(?:\]\(\S+\)|\*\*) \| .*", line):
            _, _, count, _, named, alarms, *_ = line.strip("| ").split(" | ")
            figures[found[1]] = (count, named, alarms)
    rows = re.findall(r"^\| (.+?) \| (\S+) \| (\S+) \| (\d+ of \d+) \|$", readme, re.MULTILINE)
    assert 5 <= len(rows) <= 8
    assert {name.strip("*"): tuple(row) for name, *row in rows}.items() <= figures.items()


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Run mutants of two groups, one that only derived questions show, and benign changes."""
    draw = random.Random(SEED)
    # The page names those that are missed, wrongly named, or change no answer.
    exceptions = set(re.findall(r"`([a-z0-9-]+)`", DETECTION.read_text(encoding="utf-8")))
    groups = [[m for m in mutants if m.name not in exceptions] for mutants in GROUPS.values()]
    derived = [m for group in groups for m in group if m.phase == DERIVED]
    names = list(
        dict.fromkeys(draw.choice(group).name for group in (*draw.sample(groups, 2), derived))
    )
    path = tmp_path_factory.mktemp("sample") / "found.json"
    command = ["-m", "tests.mutants.run", "--mutants", ",".join(names), "--benign", str(BENIGN)]
    answer = subprocess.run(
        [sys.executable, *command, "--json", path],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    verdicts = json.loads(Path(path).read_text(encoding="utf-8"))
    assert list(verdicts["mutants"]) == names
    return verdicts


def test_a_sample_of_the_corpus_is_found_and_named(sample: Any) -> None:
    """As docs/detection.md documents."""
    assert len(sample["mutants"]) == 3
    wrong = {
        name: verdict["outcome"]
        for name, verdict in sample["mutants"].items()
        if verdict["fate"] != "found" or not verdict["named"]
    }
    assert wrong == {}


def test_benign_runs_raise_no_alarm_by_any_rule(sample: Any) -> None:
    """Neither by snap's rules nor by those of other projects."""
    assert len(sample["alarms"]) == BENIGN
    assert {run["alarm"] for run in sample["alarms"].values()} == {""}
    assert [run["outcome"]["rules"] for run in sample["alarms"].values()] == [[]] * BENIGN


@pytest.mark.parametrize("benign", random.Random(SEED).sample(DRAWN, 8), ids=str)
def test_another_way_to_compute_the_same_raises_no_alarm(benign: Benign) -> None:
    """A sample of what `make benign` runs."""
    assert run_benign(benign, SETUP) == Alarms()


@pytest.mark.parametrize(
    "function",
    [
        functional.scaled_dot_product_attention,
        functional.linear,
        functional.gelu,
        functional.silu,
        torch.rsqrt,
    ],
)
def test_a_way_that_computes_something_else_raises_one(
    monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any]
) -> None:
    """So the others do replace these functions in the port."""
    larger = {function: lambda *given, **named: 1.1 * function(*given, **named)}
    wrong = Way("products", "wrong", within=lambda: Replaced(larger))
    monkeypatch.setattr(benign_module, "WAYS", {**WAYS, "wrong": wrong})
    assert run_benign(Benign(0, ("wrong",)), SETUP).table
