"""What a golden set keeps of each case: the tensors of every file, by name.

One place says how inputs, logits, generations and sketches are laid out; recording writes by it
and checking reads by it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from snapshot_tool.base.images import to_arrays
from snapshot_tool.base.protocol import CaseInputs, Generation, PreparedCase
from snapshot_tool.base.sketch import (
    MAX_DIMENSIONS,
    MOMENTS,
    PROJECTION_SIZE,
    SAMPLE_SIZE,
    Sketch,
    sample_indices,
)
from snapshot_tool.base.tap import Side, Tap
from snapshot_tool.goldens.packed import unpack_inputs

if TYPE_CHECKING:
    import torch
    from PIL import Image

TOP_K = 8
_LOGITS_AT_ONCE = 2**20
LOGITS = "logits"
TOKEN_IDS = "token_ids"  # noqa: S105 - a tensor's name
# The compact record of every position's logits: the greatest, their log-sum-exp, and a sample.
POSITION_RECORDS = ("position_topk_values", "position_logsumexp", "position_sample")

# Which places the records are of: near-ties may change places, and the values beside them tell.
PLACES = ("position_topk_ids", "position_sample_ids", "step_topk_ids")

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
    if inputs.image_sizes is not None:
        tensors["image_sizes"] = inputs.image_sizes
    if inputs.token_type_ids is not None:
        tensors["token_type_ids"] = inputs.token_type_ids
    for index, image in enumerate(images):
        for part, array in to_arrays(image).items():
            tensors[f"image.{index}.{part}"] = torch.from_numpy(array.copy())
    return tensors


def real_positions(inputs: CaseInputs) -> torch.Tensor:
    """Return the indices of the positions that are no padding, (real,) int64."""
    return inputs.attention_mask[0].nonzero()[:, 0]


def without_padding(tensor: torch.Tensor, inputs: CaseInputs) -> torch.Tensor:
    """Return a tensor of every position, (1, length, width), without those that are padding.

    Any other tensor is returned as it is.
    """
    if tensor.dim() != 3 or tensor.shape[:2] != inputs.input_ids.shape:  # noqa: PLR2004
        return tensor
    return tensor[:, real_positions(inputs).to(tensor.device)]


def real_rows(rows: torch.Tensor, inputs: CaseInputs) -> torch.Tensor:
    """Return the rows (length, …) of positions that are no padding; all of them are no copy."""
    return rows if bool(inputs.attention_mask.all()) else rows[real_positions(inputs)]


def widened(logits: torch.Tensor) -> torch.Tensor:
    """Return logits in at least float32: a log-sum-exp must not be rounded to half precision."""
    import torch

    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def position_records(
    logits: torch.Tensor, *, topk_ids: torch.Tensor, sample_ids: torch.Tensor
) -> Tensors:
    """Return POSITION_RECORDS of logits (real, vocabulary) at the given vocabulary ids."""
    import torch

    # In parts, since it makes a copy: the logits of a long prompt take hundreds of megabytes.
    rows = max(1, _LOGITS_AT_ONCE // logits.shape[-1])
    return {
        "position_topk_values": logits.gather(-1, topk_ids),
        "position_logsumexp": torch.cat([part.logsumexp(-1) for part in torch.split(logits, rows)]),
        "position_sample": logits[:, sample_ids],
    }


def forward_tensors(logits: torch.Tensor, inputs: CaseInputs, *, seed: int) -> Tensors:
    """Return a case's part of forward.safetensors, from all logits (length, vocabulary)."""
    import torch

    real = real_rows(logits, inputs)
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


def tap_tensors(taps: Sequence[Tap], modules: Sequence[str]) -> Tensors:
    """Return a case's part of taps.safetensors: one row for each module, in order of execution.

    The row's module is an index into `modules`. Shapes are filled up with -1 (all of it where a
    side has no sketch), samples of small tensors with zeros.
    """
    import torch

    place = {name: index for index, name in enumerate(modules)}
    tensors = {"modules": torch.tensor([place[tap.module] for tap in taps], dtype=torch.int64)}
    for side in Side:
        sketches = [tap.input if side is Side.INPUT else tap.output for tap in taps]
        for name, tensor in stack_sketches(sketches).items():
            tensors[f"{side.value}_{name}"] = tensor
    return tensors


def stack_sketches(sketches: Sequence[Sketch | None]) -> Tensors:
    """Return sketches as one tensor for each of their parts, a row for each sketch."""
    import torch

    rows = len(sketches)
    shapes = torch.full((rows, MAX_DIMENSIONS), -1, dtype=torch.int64)
    moments = torch.zeros((rows, len(MOMENTS)), dtype=torch.float64)
    samples = torch.zeros((rows, SAMPLE_SIZE))
    projections = torch.zeros((rows, PROJECTION_SIZE), dtype=torch.float64)
    for row, sketch in enumerate(sketches):
        if sketch is not None:
            shapes[row, : len(sketch.shape)] = torch.tensor(sketch.shape)
            moments[row] = sketch.moments
            samples[row, : len(sketch.sample)] = sketch.sample
            projections[row] = sketch.projection
    return {"shapes": shapes, "moments": moments, "sample": samples, "projection": projections}


def read_taps(tensors: Mapping[str, torch.Tensor], modules: Sequence[str]) -> list[Tap]:
    """Return what `tap_tensors` laid out."""
    parts = ("shapes", "moments", "sample", "projection")
    sides = [
        unstack_sketches({part: tensors[f"{side.value}_{part}"] for part in parts}) for side in Side
    ]
    names = [modules[index] for index in tensors["modules"].tolist()]
    return [Tap(name, *pair) for name, *pair in zip(names, *sides, strict=True)]


def unstack_sketches(tensors: Mapping[str, torch.Tensor]) -> list[Sketch | None]:
    """Return what `stack_sketches` laid out."""
    sketches: list[Sketch | None] = []
    for row, padded in enumerate(tensors["shapes"].tolist()):
        shape = tuple(length for length in padded if length >= 0)
        sketches.append(
            Sketch(
                shape,
                tensors["moments"][row],
                tensors["sample"][row][: math.prod(shape)],
                tensors["projection"][row],
            )
            if shape
            else None
        )
    return sketches


def read_inputs(path: Path) -> CaseInputs:
    """Return the inputs kept in a case's part of inputs.safetensors."""
    from safetensors.torch import load_file

    return as_inputs(unpack_inputs(load_file(path)))


def as_inputs(tensors: Mapping[str, torch.Tensor]) -> CaseInputs:
    """Return the inputs among a case's unpacked tensors of inputs.safetensors."""
    return CaseInputs(
        tensors["input_ids"],
        tensors["attention_mask"],
        tensors.get("pixel_values"),
        tensors.get("pixel_attention_mask"),
        tensors.get("image_sizes"),
        tensors.get("token_type_ids"),
    )
