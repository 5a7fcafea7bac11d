"""What a golden set keeps of each case: the tensors of every file, by name.

One place says how inputs, logits, generations and sketches are laid out; recording writes by it
and checking reads by it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from snapshot_tool.core.interfaces import CaseInputs, Generation, PreparedCase
from snapshot_tool.core.sketch import (
    MAX_DIMENSIONS,
    SAMPLE_SIZE,
    Sketch,
    sample_indices,
)
from snapshot_tool.images import to_arrays

if TYPE_CHECKING:
    import torch
    from PIL import Image

TOP_K = 8
LOGITS = "logits"
TOKEN_IDS = "token_ids"  # noqa: S105 - a tensor's name
# The compact record of every position's logits: the greatest, their log-sum-exp, and a sample.
POSITION_RECORDS = ("position_topk_values", "position_logsumexp", "position_sample")

Tensors = dict[str, "torch.Tensor"]


def input_tensors(prepared: PreparedCase, images: Sequence[Image.Image]) -> Tensors:
    """Return a case's part of inputs.safetensors."""
    import torch

    inputs = prepared.inputs
    tensors = {"input_ids": inputs.input_ids, "attention_mask": inputs.attention_mask}
    if inputs.pixel_values is not None:
        tensors["pixel_values"] = inputs.pixel_values
    if inputs.pixel_attention_mask is not None:
        tensors["pixel_attention_mask"] = inputs.pixel_attention_mask
    for index, image in enumerate(images):
        for part, array in to_arrays(image).items():
            tensors[f"image.{index}.{part}"] = torch.from_numpy(array.copy())
    return tensors


def real_positions(inputs: CaseInputs) -> torch.Tensor:
    """Return the indices of the positions that are no padding, (real,) int64."""
    return inputs.attention_mask[0].nonzero()[:, 0]


def position_records(
    logits: torch.Tensor, *, topk_ids: torch.Tensor, sample_ids: torch.Tensor
) -> Tensors:
    """Return POSITION_RECORDS of logits (real, vocabulary) at the given vocabulary ids."""
    return {
        "position_topk_values": logits.gather(-1, topk_ids),
        "position_logsumexp": logits.logsumexp(-1),
        "position_sample": logits[:, sample_ids],
    }


def forward_tensors(logits: torch.Tensor, inputs: CaseInputs, *, seed: int) -> Tensors:
    """Return a case's part of forward.safetensors, from all logits (length, vocabulary)."""
    import torch

    real = logits[real_positions(inputs)]
    topk_ids = real.topk(min(TOP_K, real.shape[-1])).indices
    sample_ids = torch.unique(sample_indices(real.shape[-1], seed=seed))
    records = position_records(real, topk_ids=topk_ids, sample_ids=sample_ids)
    ids = {"position_topk_ids": topk_ids, "position_sample_ids": sample_ids}
    return {LOGITS: real[-1], **records, **ids}


def generate_tensors(generation: Generation) -> Tensors:
    """Return a case's part of generate.safetensors: the ids and each step's greatest logits."""
    top = generation.logits.topk(min(TOP_K, generation.logits.shape[-1]))
    return {
        TOKEN_IDS: generation.token_ids,
        "step_topk_values": top.values,
        "step_topk_ids": top.indices,
    }


def tap_tensors(sketches: Mapping[str, Sketch], modules: Sequence[str]) -> Tensors:
    """Return a case's part of taps.safetensors: one row for each module, in order of execution.

    `modules` holds the row's module as an index into `modules`; shapes are filled up with -1,
    samples of small tensors with zeros.
    """
    import torch

    place = {name: index for index, name in enumerate(modules)}
    shapes = torch.full((len(sketches), MAX_DIMENSIONS), -1, dtype=torch.int64)
    samples = torch.zeros((len(sketches), SAMPLE_SIZE))
    for row, sketch in enumerate(sketches.values()):
        shapes[row, : len(sketch.shape)] = torch.tensor(sketch.shape)
        samples[row, : len(sketch.sample)] = sketch.sample
    return {
        "modules": torch.tensor([place[name] for name in sketches], dtype=torch.int64),
        "shapes": shapes,
        "moments": torch.stack([sketch.moments for sketch in sketches.values()]),
        "sample": samples,
        "projection": torch.stack([sketch.projection for sketch in sketches.values()]),
    }


def read_inputs(path: Path) -> CaseInputs:
    """Return the inputs kept in a case's part of inputs.safetensors."""
    from safetensors.torch import load_file

    tensors = load_file(path)
    return CaseInputs(
        tensors["input_ids"],
        tensors["attention_mask"],
        tensors.get("pixel_values"),
        tensors.get("pixel_attention_mask"),
    )
