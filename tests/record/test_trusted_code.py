"""Code that a checkpoint brings along runs when the user says so, and never otherwise."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import CHECKPOINT, Snap, error_lines, set_folder
from tests.unit.hub import REPOSITORY, serve_hub

pytestmark = pytest.mark.record

_CODE = """
from pathlib import Path
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
Path({canary!r}).write_text("ran")
class OwnProcessor(Idefics3Processor):
    pass
"""
_SMALL = ("--variants", "0", "--max-new-tokens", "1")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Copy the embedded checkpoint, with a Python file that its processor's configuration names."""
    folder = Path(shutil.copytree(CHECKPOINT, tmp_path / "with-code"))
    code = _CODE.format(canary=str(tmp_path / "canary"))
    (folder / "own.py").write_text(code, encoding="utf-8")
    path = folder / "processor_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoProcessor": "own.OwnProcessor"}
    path.write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_code_of_a_checkpoint_runs_only_when_it_is_trusted(
    snap: Snap, checkpoint: Path, tmp_path: Path
) -> None:
    """And the manifest says that it ran."""
    options = ("record", "--checkpoint", checkpoint, *_SMALL)
    environment = {"HF_HOME": str(tmp_path / "hf")}
    careful = snap(*options, "--goldens", tmp_path / "careful", **environment)
    assert careful.code == 0, careful.err
    assert not (tmp_path / "canary").exists()
    trusting = snap(
        *options, "--goldens", tmp_path / "trusting", "--trust-remote-code", **environment
    )
    assert trusting.code == 0, trusting.err
    assert (tmp_path / "canary").exists()
    said = {}
    for name in ("careful", "trusting"):
        manifest = set_folder(tmp_path / name) / "manifest.json"
        said[name] = json.loads(manifest.read_text(encoding="utf-8"))["environment"]
    assert "remote_code" not in said["careful"]
    assert said["trusting"]["remote_code"] == "trusted"


def test_options_work_for_a_hub_id_as_for_a_folder(
    snap: Snap, checkpoint: Path, tmp_path: Path
) -> None:
    """Trusted code is downloaded with the files that name it, and a prompt can be traced."""
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    model = ("--checkpoint", REPOSITORY, "--revision", "main")
    with serve_hub(files) as address:
        environment = {
            "HF_ENDPOINT": address,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": "0",
        }
        recorded = snap(
            "record", *model, *_SMALL, "--goldens", tmp_path / "goldens", "--trust-remote-code",
            "--prompt", _prompts(tmp_path), "--long", 40, **environment,
        )  # fmt: skip
        assert recorded.code == 0, recorded.err
        traced = snap(
            "trace", "--impl", "hf", *model, "--prompt", "Hello", "--out", tmp_path / "hf.st",
            **environment,
        )  # fmt: skip
        assert traced.code == 0, traced.err
    assert (tmp_path / "canary").exists()
    manifest = json.loads((set_folder(tmp_path / "goldens") / "manifest.json").read_text("utf-8"))
    assert manifest["checkpoint"]["name"] == REPOSITORY
    assert "own.py" in manifest["checkpoint"]["files"]
    assert {"prompt-01", "long-40"} <= {case["name"] for case in manifest["cases"]}


def _prompts(folder: Path) -> Path:
    (folder / "prompts.txt").write_text("a prompt\n", encoding="utf-8")
    return folder / "prompts.txt"


def test_pickled_weights_are_not_read(snap: Snap, tmp_path: Path) -> None:
    """A checkpoint whose weights are a pickle is refused: unpickling runs what it names."""
    folder = Path(shutil.copytree(CHECKPOINT, tmp_path / "pickled"))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    run = snap("record", "--checkpoint", folder, "--goldens", tmp_path / "goldens", *_SMALL)
    assert run.code == 3
    assert "cannot load" in error_lines(run)[0]
