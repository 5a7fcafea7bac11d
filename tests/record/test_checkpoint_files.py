"""The files that count as a checkpoint's are those that transformers loads."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from snapshot_tool.base.checkpoint import is_small_file
from tests.conftest import CHECKPOINT, Snap, set_folder
from tests.unit.hub import REPOSITORY, serve_hub

pytestmark = pytest.mark.record

_CODE = b"""
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
class OwnProcessor(Idefics3Processor):
    pass
"""


def test_the_vocabularies_of_all_tokenizers_count() -> None:
    """Each module of transformers names its files; pickled ones are not read."""
    import transformers

    models = Path(transformers.__file__).parent / "models"
    files: set[str] = set()
    for path in models.glob("*/tokenization_*.py"):
        for statement in ast.parse(path.read_text(encoding="utf-8")).body:
            match statement:
                case ast.Assign(targets=[ast.Name(id="VOCAB_FILES_NAMES")], value=names):
                    files |= set(ast.literal_eval(names).values())
    assert len(files) > 20
    assert {file for file in files if not is_small_file(file)} <= {"vocab.pkl", "vocab.bin"}


def test_code_of_a_hub_checkpoint_runs_if_it_is_trusted(snap: Snap, tmp_path: Path) -> None:
    """It is downloaded and pinned like the code in a folder."""
    files = {path.name: path.read_bytes() for path in CHECKPOINT.iterdir()}
    config = json.loads(files["processor_config.json"])
    config["auto_map"] = {"AutoProcessor": "own.OwnProcessor"}
    files["processor_config.json"] = json.dumps(config).encode()
    files |= {"own.py": _CODE, "original/model.safetensors": files["model.safetensors"]}
    with serve_hub(files) as endpoint:
        run = snap(
            "record", "--checkpoint", REPOSITORY, "--revision", "main",
            "--goldens", tmp_path / "goldens", "--variants", "0", "--max-new-tokens", "1",
            "--trust-remote-code", HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="0",
            HF_HOME=str(tmp_path / "home"),
        )  # fmt: skip
        assert run.code == 0, run.err
        traced = snap(
            "trace", "--impl", "hf", "--checkpoint", REPOSITORY, "--revision", "main",
            "--prompt", "Hello.", "--out", tmp_path / "trace.safetensors",
            HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path / "home"),
        )  # fmt: skip
    assert traced.code == 0, traced.err
    manifest = json.loads((set_folder(tmp_path / "goldens") / "manifest.json").read_text("utf-8"))
    assert manifest["environment"]["remote_code"] == "trusted"
    assert manifest["checkpoint"]["files"].keys() == files.keys() - {"original/model.safetensors"}
