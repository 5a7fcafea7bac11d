"""The arithmetic of docs/scale.md is that of what recordings write."""

from __future__ import annotations

from math import prod

import pytest

from benchmarks.estimate import Decoder
from snapshot_tool.goldens.layout import find_set_folders
from snapshot_tool.goldens.manifest import Manifest, load_manifest
from tests.conftest import ROOT

BYTES = {"I64": 8, "F64": 8, "F32": 4}


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    """Return the committed llama's."""
    folders = find_set_folders(ROOT / "tests" / "families" / "goldens")
    return load_manifest(next(folder for folder in folders if "llama" in str(folder)))


@pytest.mark.parametrize("case", ["one-sentence", "variant-02"])
def test_a_recorded_case_has_the_bytes_that_the_arithmetic_gives(
    manifest: Manifest, case: str
) -> None:
    """File by file."""

    def shape(part: str, name: str) -> tuple[int, ...]:
        return manifest.files[f"{part}.safetensors"].tensors[f"{case}/{name}"].shape

    config = manifest.checkpoint.config
    (new,) = shape("generate", "token_ids")
    (sampled,) = shape("forward", "position_sample_ids")
    tokens = shape("inputs", "input_ids")[1]
    layers = int(config["num_hidden_layers"])
    model = Decoder(0, layers, int(config["vocab_size"]), tokens, new, sampled)
    for part, size in model.case_bytes().items():
        tensors = manifest.files[f"{part}.safetensors"].tensors
        own = [entry for key, entry in tensors.items() if key.startswith(f"{case}/")]
        assert sum(prod(entry.shape) * BYTES[entry.dtype] for entry in own) == size, part
