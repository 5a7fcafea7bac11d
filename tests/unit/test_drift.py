"""What differs between two golden sets, and what of it counts."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from snapshot_tool.core.results import Verdict
from snapshot_tool.drift import Drift, describe_drift, diff_folders
from snapshot_tool.store.layout import INPUTS
from snapshot_tool.store.manifest import load_manifest
from snapshot_tool.store.tensors import describe_file
from snapshot_tool.store.verify import set_file
from tests.unit.factory import write_golden, write_manifest

Change = Callable[[dict[str, torch.Tensor]], object]


def drift_after(tmp_path: Path, file: str, change: Change) -> list[Drift]:
    """Change some tensors of a copy of a set and return what differs."""
    one = write_golden(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    other = tmp_path / "other" / one.relative_to(tmp_path / "one")
    path = set_file(other, file)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    manifest = load_manifest(other)
    files = {**manifest.files, file: describe_file(path)}
    write_manifest(other, msgspec.structs.replace(manifest, files=files))
    return diff_folders(one, other)[2]


def add(key: str, amount: float) -> Change:
    """Add to all elements of a tensor."""
    return lambda tensors: tensors.update({key: tensors[key] + amount})


def test_equal_sets_do_not_differ(tmp_path: Path) -> None:
    """Rewritten with the same values, nothing has moved."""
    assert drift_after(tmp_path, "vision.safetensors", lambda _tensors: None) == []


@pytest.mark.parametrize(
    ("file", "key", "amount", "verdict"),
    [
        ("vision.safetensors", "two-images/last_hidden_state", 1e-4, Verdict.PASS),
        ("vision.safetensors", "two-images/last_hidden_state", 1e-2, Verdict.FAIL),
        ("forward.safetensors", "text-only/logits", 2e-5, Verdict.PASS),
        ("forward.safetensors", "text-only/logits", 1e-3, Verdict.FAIL),
        # Logits that generation keeps are judged as logits, its tokens exactly.
        ("generate.safetensors", "text-only/step_topk_values", 2e-5, Verdict.PASS),
        ("generate.safetensors", "text-only/step_topk_values", 1e-3, Verdict.FAIL),
        ("generate.safetensors", "text-only/token_ids", 1, Verdict.FAIL),
        # Which of two near-ties comes first says nothing by itself.
        ("generate.safetensors", "text-only/step_topk_ids", 1, Verdict.PASS),
        (INPUTS, "two-images/pixel_values", 1e-6, Verdict.FAIL),
        (INPUTS, "two-images/input_ids", 1, Verdict.FAIL),
    ],
)
def test_a_tensor_that_moved_is_judged_by_its_own_tolerance(
    tmp_path: Path, file: str, key: str, amount: float, verdict: Verdict
) -> None:
    """It alone is reported, with its figures."""
    (drift,) = drift_after(tmp_path, file, add(key, amount))
    assert f"{drift.case}/{drift.tensor}" == key
    assert drift.verdict is verdict


def test_a_tensor_without_a_partner_counts(tmp_path: Path) -> None:
    """Missing on one side is a difference, and said where."""
    key = "two-images/image_hidden_states"
    (drift,) = drift_after(tmp_path, "connector.safetensors", lambda tensors: tensors.pop(key))
    assert drift.verdict is Verdict.FAIL
    assert drift.reason == f"not in {tmp_path / 'other' / drift_folder()}"
    (line,) = describe_drift([drift])
    assert line.startswith("connector: 1 tensors moved, 1 beyond tolerance")


def drift_folder() -> Path:
    """Return the factory's set folder below its root."""
    return Path("local--tiny") / "0123456789ab" / "cpu-float32"
