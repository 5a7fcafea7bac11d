"""A reference that cannot be right is not recorded, and what is doubtful about one is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from snapshot_tool.base.errors import CheckpointUnavailable, ReferenceWrong
from snapshot_tool.goldens.manifest import CheckpointEntry
from tests.conftest import Snap
from tests.record.checkpoints import (
    IDEFICS3,
    LLAMA,
    ROBERTA,
    SMALL,
    Notes,
    build_checkpoint,
    copy_checkpoint,
    edit_json,
    edit_weights,
    manifest_of,
    record_here,
)

pytestmark = pytest.mark.record


def overflowing(folder: Path) -> Path:
    """Return a Llama whose activations float16 cannot hold."""
    from safetensors.torch import load_file

    copy_checkpoint(LLAMA, folder)
    name = "model.layers.0.mlp.down_proj.weight"
    edit_weights(folder, **{name: load_file(folder / "model.safetensors")[name] * 3e5})
    return folder


def test_an_answer_with_nan_is_refused_before_the_oracle_and_named(tmp_path: Path) -> None:
    """With its case and tensor; what is staged can be kept with --allow-nan."""
    folder = overflowing(tmp_path / "ck")
    goldens = tmp_path / "goldens"
    with pytest.raises(ReferenceWrong, match=r"NaN in case one-sentence: forward logits"):
        record_here(folder, goldens, dtype="float16", oracle=True)
    assert not list(goldens.glob("*/*/*/manifest.json"))
    assert not list(goldens.rglob("oracle*"))
    notes = Notes()
    manifest = record_here(
        folder, goldens, dtype="float16", resume=True, oracle=True, allow_nan=True, notes=notes
    )
    assert "forward/logits" in manifest.cases[0].not_finite
    assert any("NaN in case one-sentence" in line for line in notes.lines)
    again = record_here(
        folder, goldens, dtype="float16", oracle=False, allow_nan=True, update=True, reason="x",
        max_new_tokens=3,
    )  # fmt: skip
    assert again.golden_version == 2


def test_an_oracle_that_overflows_is_reported_and_no_limit_is_made_of_it(
    snap: Snap, tmp_path: Path
) -> None:
    """A check in float16 does not pass because the reference itself overflows in it."""
    folder = overflowing(tmp_path / "ck")
    goldens = tmp_path / "goldens"
    notes = Notes()
    record_here(folder, goldens, oracle=True, notes=notes)
    assert any("in float16 the reference returns NaN or Inf" in line for line in notes.lines)
    assert not any("bfloat16" in line for line in notes.lines)
    run = snap("show", "--goldens", goldens)
    assert run.code == 0, run.err


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        (
            {
                "transformers_version": "5.2.0",
                "rope_parameters": {"rope_theta": 2e4, "rope_type": "default"},
                "dtype": "float32",
            },
            "is of transformers 5.2.0, installed is 4.51.3, which does not have dtype, rope_para",
        ),
        ({"transformers_version": "5.0.0.dev0"}, "is of transformers 5.0.0.dev0"),
        ({"rope_parameters": {"rope_theta": 2e4}}, "has rope_parameters: newer releases use"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "has layer_types"),
        ({"text_config": {"rope_parameters": {"rope_theta": 2e4}}}, "has text_config.rope_param"),
    ],
)
def test_a_configuration_that_only_newer_releases_compute_by_is_refused(
    tmp_path: Path, fields: dict[str, Any], problem: str
) -> None:
    """With the names of the fields, nested ones too, and the release to record with."""
    nested = fields.get("text_config")
    folder = copy_checkpoint(IDEFICS3 if nested else LLAMA, tmp_path / "ck")
    if nested:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        fields = {"text_config": {**config["text_config"], **nested}}
    edit_json(folder / "config.json", **fields)
    with pytest.raises(CheckpointUnavailable) as caught:
        record_here(folder, tmp_path / "goldens")
    assert problem in caught.value.problem
    assert caught.value.remedy.startswith("record it with transformers ")


def test_other_fields_that_the_class_does_not_know_are_listed_by_show(
    snap: Snap, tmp_path: Path
) -> None:
    """SmolVLM's config.json has a dozen of them: they are no reason to refuse it."""
    folder = copy_checkpoint(IDEFICS3, tmp_path / "ck")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = {**config["text_config"], "pixel_shuffle_factor": 4, "layer_types": ["full_attention"]}
    edit_json(
        folder / "config.json", text_config=text, use_base_siglip=True, dtype="float32",
        transformers_version="4.57.6",
    )  # fmt: skip
    goldens = tmp_path / "goldens"
    checkpoint = record_here(folder, goldens, max_new_tokens=1).checkpoint
    assert checkpoint.unknown_fields == (
        "dtype", "text_config.layer_types", "text_config.pixel_shuffle_factor", "use_base_siglip",
    )  # fmt: skip
    shown = snap("show", "--goldens", goldens).out
    assert all(field in shown for field in checkpoint.unknown_fields)


def test_heads_of_other_classes_are_no_reason_to_refuse(tmp_path: Path) -> None:
    """The layout of bert-base and roberta-base; the names are kept."""
    import torch

    folder = copy_checkpoint(ROBERTA, tmp_path / "ck")
    extra = {"roberta.pooler.dense.weight": torch.ones(64, 64), "cls.seq.bias": torch.ones(2)}
    edit_weights(folder, **extra)
    assert checkpoint_of(folder, tmp_path).unused_weights == tuple(sorted(extra))


def test_an_output_head_that_the_tied_embedding_replaces_is_unused(tmp_path: Path) -> None:
    """tie_word_embeddings makes transformers ignore it, unless it has the same values."""
    import torch
    from safetensors.torch import load_file

    folder = build_checkpoint("qwen3", tmp_path)
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    edit_weights(folder, **{"lm_head.weight": embedding.clone()})
    assert checkpoint_of(folder, tmp_path / "same").unused_weights == ()
    edit_weights(folder, **{"lm_head.weight": torch.randn_like(embedding)})
    assert checkpoint_of(folder, tmp_path / "other").unused_weights == ("lm_head.weight",)


def checkpoint_of(folder: Path, work: Path) -> CheckpointEntry:
    """Record a checkpoint and return what the manifest says of it."""
    return record_here(folder, work / "goldens", variants=0, max_new_tokens=1).checkpoint


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.7.mlp.up_proj.weight"]
)
def test_a_weight_for_a_part_of_the_model_that_does_not_take_it_is_refused(
    tmp_path: Path, name: str
) -> None:
    """A bias that the configuration switches off, a layer that it does not count."""
    import torch

    folder = copy_checkpoint(LLAMA, tmp_path / "ck")
    edit_weights(folder, **{name: torch.ones(8)})
    with pytest.raises(CheckpointUnavailable, match=f"does not take it: {name}"):
        record_here(folder, tmp_path / "goldens")


def test_what_transformers_warns_of_is_kept_and_shown(snap: Snap, tmp_path: Path) -> None:
    """By record and show; a resumed recording keeps the same."""
    folder = build_checkpoint(
        "qwen3", tmp_path, use_sliding_window=True, sliding_window=512, max_window_layers=1
    )
    goldens = tmp_path / "goldens"
    # A process of its own: transformers logs each warning once in a process.
    options = ("--checkpoint", folder, "--goldens", goldens, *SMALL)
    run = snap("record", *options, HF_HUB_OFFLINE="1")
    assert run.code == 0, run.err
    (warning,) = [w for w in manifest_of(goldens)["warnings"] if "Sliding Window" in w]
    assert str(tmp_path) not in warning
    for shown in (run.err, snap("show", "--goldens", goldens).out):
        assert warning in shown


def test_a_clean_recording_warns_of_nothing(llama_set: Path) -> None:
    """No warning is kept in the manifest."""
    assert "warnings" not in manifest_of(llama_set)
