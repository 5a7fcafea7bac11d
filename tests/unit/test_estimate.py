"""The arithmetic of docs/scale.md is that of what recordings write."""

from __future__ import annotations

from math import prod

import pytest

from benchmarks.estimate import Decoder
from snapshot_tool.goldens.find import find_goldens
from snapshot_tool.goldens.manifest import Manifest
from tests.conftest import ROOT

BYTES = {"I64": 8, "F64": 8, "F32": 4}


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    """Return the committed llama's."""
    found = find_goldens(ROOT / "tests" / "families" / "goldens")
    return next(f for f in found if "llama" in str(f.folder)).require_manifest()


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
