"""Code that a checkpoint brings along runs when the user says so, and never otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import Snap, error_lines
from tests.record.checkpoints import IDEFICS3, copy_checkpoint, edit_json, manifest_of
from tests.unit.hub import REPOSITORY, serve_hub

pytestmark = pytest.mark.record

CODE = """
from pathlib import Path
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
Path({canary!r}).write_text("ran")
class OwnProcessor(Idefics3Processor):
    pass
"""
SMALL = ("--variants", "0", "--max-new-tokens", "1")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Copy the embedded checkpoint, with a Python file that its processor's configuration names."""
    folder = copy_checkpoint(IDEFICS3, tmp_path / "with-code")
    code = CODE.format(canary=str(tmp_path / "canary"))
    (folder / "own.py").write_text(code, encoding="utf-8")
    edit_json(folder / "processor_config.json", auto_map={"AutoProcessor": "own.OwnProcessor"})
    return folder


def test_code_of_a_checkpoint_runs_only_when_it_is_trusted(
    snap: Snap, checkpoint: Path, tmp_path: Path
) -> None:
    """And the manifest says that it ran."""
    options = ("record", "--checkpoint", checkpoint, *SMALL)
    for name, trust in (("careful", ()), ("trusting", ("--trust-remote-code",))):
        run = snap(*options, "--goldens", tmp_path / name, *trust)
        assert run.code == 0, run.err
        assert (tmp_path / "canary").exists() == bool(trust)
        recorded = manifest_of(tmp_path / name)["environment"]
        assert recorded.get("remote_code") == ("trusted" if trust else None)


def test_options_work_for_a_hub_id_as_for_a_folder(
    snap: Snap, checkpoint: Path, tmp_path: Path
) -> None:
    """Trusted code is downloaded with the files that name it, and a prompt can be traced."""
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    model = ("--checkpoint", REPOSITORY, "--revision", "main")
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps(["a prompt"]), encoding="utf-8")
    with serve_hub({**files, "original/model.safetensors": b"not loaded"}) as address:
        environment = {
            "HF_ENDPOINT": address,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": "0",
        }
        recorded = snap(
            "record", *model, *SMALL, "--goldens", tmp_path / "goldens", "--trust-remote-code",
            "--prompt", prompts, "--long", 40, **environment,
        )  # fmt: skip
        assert recorded.code == 0, recorded.err
        traced = snap(
            "trace", "--impl", "hf", *model, "--prompt", "Hello", "--out", tmp_path / "hf.st",
            **environment,
        )  # fmt: skip
        assert traced.code == 0, traced.err
    assert (tmp_path / "canary").exists()
    manifest = manifest_of(tmp_path / "goldens")
    assert manifest["checkpoint"]["name"] == REPOSITORY
    assert manifest["checkpoint"]["files"].keys() == files.keys()
    assert {"prompt-01", "long-40"} <= {case["name"] for case in manifest["cases"]}


def test_pickled_weights_are_not_read(snap: Snap, tmp_path: Path) -> None:
    """A checkpoint whose weights are a pickle is refused: unpickling runs code in it."""
    folder = copy_checkpoint(IDEFICS3, tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    run = snap("record", "--checkpoint", folder, "--goldens", tmp_path / "goldens", *SMALL)
    assert run.code == 3
    assert "cannot load" in error_lines(run)[0]
