"""`snap record --oracle`: the reference in float64, and its own errors in each dtype."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from snapshot_tool.goldens.golden import open_golden
from snapshot_tool.reference.huggingface import float64_throughout
from tests.conftest import CHECKPOINT, Snap, error_lines, set_folder
from tests.record.checkpoints import manifest_of, record_here

pytestmark = pytest.mark.record


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Record a small set with a float64 reference and one case's whole outputs."""
    goldens = tmp_path_factory.mktemp("oracle") / "goldens"
    options: dict[str, Any] = {"variants": 0, "max_new_tokens": 3, "modules": ("one-*",)}
    record_here(CHECKPOINT, goldens, oracle=True, **options)
    return goldens


def load(goldens: Path, name: str) -> dict[str, torch.Tensor]:
    """Return the tensors of one file of the set."""
    return load_file(set_folder(goldens) / f"{name}.safetensors")


def test_the_delta_of_the_connector_leads_to_float64_arithmetic(recorded: Path) -> None:
    """Pixel shuffle and projection by hand, on the golden's own vision features."""
    features = load(recorded, "vision")["one-image/last_hidden_state"].double()
    weight = load_file(CHECKPOINT / "model.safetensors")
    projection = weight["model.connector.modality_projection.proj.weight"].double()
    tiles, scale, grid = len(features), 4, 8
    square = features.reshape(tiles, grid // scale, scale, grid // scale, scale, -1)
    shuffled = square.transpose(2, 3).reshape(tiles, (grid // scale) ** 2, -1)
    by_hand = shuffled @ projection.T
    kept = load(recorded, "connector")["one-image/image_hidden_states"].double()
    oracle = load(recorded, "oracle")
    delta = oracle["one-image/connector.image_hidden_states.delta"].double()
    errors = (by_hand - kept).abs().amax()
    assert 0 < errors < 1e-4
    # bfloat16 keeps three digits of a difference.
    assert (kept + delta - by_hand).abs().amax() < errors / 100


def test_the_noise_is_how_far_float32_is_from_float64(recorded: Path) -> None:
    """Root mean square at each position, of what the deltas say element by element."""
    oracle = load(recorded, "oracle")
    for tensor in ("vision.last_hidden_state", "forward.position_sample"):
        delta = oracle[f"two-images/{tensor}.delta"].double()
        noise = oracle[f"two-images/{tensor}.noise.float32"].double()
        assert noise.shape == delta.shape[:-1]
        assert torch.allclose(noise, delta.square().mean(-1).sqrt(), rtol=1e-2)


@pytest.mark.parametrize(
    ("dtype", "unit", "module_limit", "step_limit"),
    [("float32", 1, 1e-5, 1e-4), ("bfloat16", 2**16, 0.2, 1.0), ("float16", 2**13, 0.02, 0.1)],
)
def test_the_noise_of_a_dtype_follows_its_unit(
    recorded: Path, dtype: str, unit: int, module_limit: float, step_limit: float
) -> None:
    """Of tensors, of every module (one row for each tap) and of every generation step."""
    oracle, taps = load(recorded, "oracle"), load(recorded, "taps")
    kept = "one-image/vision.last_hidden_state.noise"
    ratio = float(oracle[f"{kept}.{dtype}"].mean() / oracle[f"{kept}.float32"].mean())
    assert unit / 4 <= ratio <= unit * 4
    rows = oracle[f"one-image/taps.noise.{dtype}"]
    assert rows.shape == (len(taps["one-image/modules"]), 2)
    known = rows[rows >= 0]
    assert len(known) > len(rows)
    assert 0 < float(known.max()) < module_limit
    steps = oracle[f"one-image/generate.step_noise.{dtype}"]
    assert steps.shape == load(recorded, "generate")["one-image/token_ids"].shape
    assert 0 < float(steps.max()) < step_limit


def test_a_module_by_itself_rounds_less_than_all_before_it(recorded: Path) -> None:
    """Its noise is measured on the recorded input, in every dtype, and is not that of the run."""
    oracle = load(recorded, "oracle")
    for dtype in ("float32", "bfloat16"):
        run, alone = (oracle[f"one-image/{kind}.noise.{dtype}"] for kind in ("taps", "modules"))
        outputs = alone[:, 1] > 0
        assert outputs.sum() > 80
        assert alone[outputs, 1].median() < run[outputs, 1].median()
        assert alone[outputs, 1].max() <= run[outputs, 1].max()


def test_single_modules_are_run_on_inputs_of_many_sizes(recorded: Path) -> None:
    """Every norm, layer, activation and table, with what rounding does to each in every dtype."""
    golden = open_golden(set_folder(recorded))
    probes = golden.probes()
    kinds = {probe.module.rpartition(".")[2] for probe in probes}
    assert {"layer_norm1", "q_proj", "act_fn", "norm", "embed_tokens", "patch_embedding"} <= kinds
    assert len({probe.module for probe in probes}) > 60
    assert (min(p.size for p in probes if p.size), max(p.size for p in probes)) == (1e-4, 1e3)
    for probe in probes:
        assert probe.noise["float32"] < 1e-5
        assert probe.noise["float32"] <= probe.noise["bfloat16"]
    assert (set_folder(recorded) / "probes.safetensors").stat().st_size < 500_000


def test_whole_inputs_and_outputs_are_kept_of_the_cases_named(recorded: Path) -> None:
    """Every module's, and of no other case; what the phases keep is the same tensor."""
    assert "--modules 'one-*'" in manifest_of(recorded)["history"][0]["command"]
    inputs = load(recorded, "module_inputs")
    assert {key.partition("/")[0] for key in inputs} == {"one-image"}
    assert len(inputs) > 90
    outputs = load(recorded, "outputs")
    assert {key.partition("/")[0] for key in outputs} == {"one-image"}
    vision = load(recorded, "vision")["one-image/last_hidden_state"]
    assert torch.equal(outputs["one-image/model.vision_model"], vision)
    assert len(outputs) > 90


def test_an_update_keeps_oracle_and_whole_outputs_unless_told_otherwise(
    snap: Snap, recorded: Path, tmp_path: Path
) -> None:
    """They are recorded again with the answers; dropping them is said in the history."""
    goldens = Path(shutil.copytree(recorded, tmp_path / "goldens"))
    options = ("record", "--checkpoint", CHECKPOINT, "--goldens", goldens, "--update")
    partial = snap(*options, "--reason", "vision alone", "--phase", "vision")
    assert partial.code == 2
    assert error_lines(partial)[0] == "snap: an oracle belongs to all phases"
    dropped = snap(*options, "--yes", "--reason", "smaller", "--no-oracle")
    assert dropped.code == 0, dropped.err
    assert "moved: oracle: dropped" in dropped.out
    files = manifest_of(goldens)["files"]
    assert "oracle.safetensors" not in files
    assert {"outputs.safetensors", "module_inputs.safetensors", "probes.safetensors"} <= set(files)


def test_float64_throughout_lifts_casts_to_float32() -> None:
    """Transformers' RMSNorm computes in float32 whatever the model's dtype."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = LlamaRMSNorm(96).double()
    values = torch.randn(4, 96, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    by_hand = values / (values.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    with torch.no_grad():
        plain = norm(values)
        with float64_throughout():
            wide = norm(values)
    assert (plain - by_hand).abs().amax() > 1e-9
    assert (wide - by_hand).abs().amax() < 1e-14
