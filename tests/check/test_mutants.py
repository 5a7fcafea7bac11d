"""The corpus of faults: each still applies, docs/detection.md is about all, a sample is found."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from snapshot_tool.base.protocol import CandidateRequest
from snapshot_tool.candidates.fms.candidate import FmsCandidate, load_fms_candidate
from snapshot_tool.goldens.golden import open_golden
from tests.conftest import CHECKOUT, CHECKPOINT, GOLDENS, ROOT, set_folder
from tests.mutants.corpus import GROUPS, MUTANTS
from tests.mutants.mutant import Change, Edit

DETECTION = ROOT / "docs" / "detection.md"
SEED = 1
BENIGN = 4


def documented() -> dict[str, tuple[str, str]]:
    """Return, by mutant, in what docs/detection.md says it was found and what was named."""
    _, _, table = DETECTION.read_text(encoding="utf-8").partition("## Every mutant")
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return {row[0]: (row[2], row[3] if len(row) > 3 else "") for row in rows if row[0] in MUTANTS}


@pytest.mark.parametrize("group", GROUPS)
def test_every_edit_of_the_corpus_still_applies(group: str) -> None:
    """Its text is in the checkout exactly once: otherwise the mutant has to be written anew."""
    edits = {m.name: m.fault for m in GROUPS[group] if isinstance(m.fault, Edit)}
    found = {
        name: (CHECKOUT / edit.file).read_text(encoding="utf-8").count(edit.old)
        for name, edit in edits.items()
    }
    assert found == dict.fromkeys(edits, 1)


@pytest.fixture(scope="module")
def candidate() -> FmsCandidate:
    """Load the checkout's model once."""
    config = open_golden(set_folder(GOLDENS)).manifest.checkpoint.config
    request = CandidateRequest(CHECKPOINT, config, "cpu", "float32")
    return load_fms_candidate(request, fms_path=CHECKOUT)


def test_every_change_of_a_weight_changes_the_model(candidate: FmsCandidate) -> None:
    """The weight is there under its name, and is another one afterwards."""
    changes = {m.name: m.fault for m in MUTANTS.values() if isinstance(m.fault, Change)}
    before = {name: tensor.clone() for name, tensor in candidate.model.state_dict().items()}
    for name, change in changes.items():
        with torch.no_grad():
            change.apply(candidate.model)
        after = candidate.model.state_dict()
        assert any(not torch.equal(before[key], after[key]) for key in before), name
        candidate.model.load_state_dict(before)
    assert len(changes) > 20


def test_names_are_unique() -> None:
    """Two mutants of one name would hide each other."""
    assert len(MUTANTS) == sum(map(len, GROUPS.values()))


def test_the_report_is_about_every_mutant() -> None:
    """A mutant that was added or renamed needs `make mutants`."""
    assert documented().keys() == MUTANTS.keys()


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Run a mutant of each group, one that only derived questions show, and benign changes."""
    known = documented()
    draw = random.Random(SEED)
    found = {
        n for n, (where, named) in known.items() if "**" not in where and ", not " not in named
    }
    groups = [[m.name for m in mutants if m.name in found] for mutants in GROUPS.values()]
    groups.append([name for name in found if known[name][0].startswith("derived")])
    names = list(dict.fromkeys(draw.choice(sorted(group)) for group in groups))
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
    """As docs/detection.md says of them."""
    assert len(sample["mutants"]) >= 7
    wrong = {
        name: verdict["outcome"]
        for name, verdict in sample["mutants"].items()
        if verdict["fate"] != "found" or not verdict["named"]
    }
    assert wrong == {}


def test_benign_changes_raise_no_alarm(sample: Any) -> None:
    """Other thread counts and attention without a fused kernel."""
    assert len(sample["alarms"]) == BENIGN
    assert set(sample["alarms"].values()) == {""}
