"""A recorded configuration cannot be larger than the checkpoint that it belongs to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from snapshot_tool.base.errors import CandidateUnavailable
from snapshot_tool.base.protocol import CandidateRequest
from snapshot_tool.candidates.fms.candidate import load_fms_candidate
from snapshot_tool.goldens.manifest import load_manifest
from tests.conftest import CHECKOUT, ROOT, Snap, error_lines, set_folder

LLAMA = ROOT / "tests" / "families" / "checkpoints" / "llama"
CONFIG = load_manifest(
    next((ROOT / "tests" / "families" / "goldens" / "local--llama").glob("*/cpu-float32"))
).checkpoint.config
HUGE: dict[str, dict[str, Any]] = {
    "width": {"hidden_size": 10**9},
    "vocabulary": {"vocab_size": 10**12},
    "inner width": {"intermediate_size": 10**9},
    "layers": {"num_hidden_layers": 10**9},
    "positions": {"max_position_embeddings": 10**9},
}


def load(config: dict[str, Any], checkpoint: Path = LLAMA) -> None:
    """Build FMS's model."""
    load_fms_candidate(CandidateRequest(checkpoint, config, "cpu", "float32"), fms_path=CHECKOUT)


@pytest.mark.parametrize("what", HUGE)
def test_a_huge_configuration_is_refused_before_memory_is_taken(what: str) -> None:
    """By the sizes of the checkpoint's weights: no machine has the memory for it."""
    with pytest.raises(CandidateUnavailable, match="the recorded configuration is not that of"):
        load({**CONFIG, **HUGE[what]})


def test_as_many_positions_as_the_checkpoint_itself_says_are_taken(tmp_path: Path) -> None:
    """More than usual is right if config.json says the same."""
    many = {**CONFIG, "max_position_embeddings": 2**20 + 8}
    with pytest.raises(CandidateUnavailable, match="max_position_embeddings is 1048584"):
        load(many)
    folder = tmp_path / "llama"
    shutil.copytree(LLAMA, folder)
    own = json.loads((folder / "config.json").read_text("utf-8"))
    own["max_position_embeddings"] = 2**20 + 8
    (folder / "config.json").write_text(json.dumps(own), encoding="utf-8")
    load(many, folder)


def test_a_golden_set_with_a_huge_configuration_is_refused_in_one_message(
    snap: Snap, goldens_copy: Path
) -> None:
    """As a user meets it, with FMS's idefics3: exit 3, and what to do."""
    path = set_folder(goldens_copy) / "manifest.json"
    tree = json.loads(path.read_bytes())
    tree["checkpoint"]["config"]["text_config"]["vocab_size"] = 10**12
    path.write_text(json.dumps(tree), encoding="utf-8")
    refused = snap("check", "--fms-path", CHECKOUT, "--goldens", goldens_copy)
    assert refused.code == 3
    assert "its model has 192000000" in error_lines(refused)[0]
    assert error_lines(refused)[1].strip().startswith("record the checkpoint again")
