"""The tensors of a golden set's files: how inputs, logits, generations and sketches are laid out.

Recording writes them and checking reads them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

from snapshot_tool.base.protocol import CaseInputs, Generation, PreparedCase, Side
from snapshot_tool.goldens.images import to_arrays, unpack_inputs
from snapshot_tool.taps.sketches import (
    MAX_DIMENSIONS,
    MOMENTS,
    PROJECTION_SIZE,
    SAMPLE_SIZE,
    Probe,
    Sketch,
    Tap,
    sample_indices,
)
from snapshot_tool.taps.sketches import without_padding as text_without_padding

TOP_K = 20
INPUT_NAMES = tuple(field.name for field in fields(CaseInputs))
_LOGITS_AT_ONCE = 2**20
_SKETCH = ("shapes", "moments", "sample", "projection")
LOGITS = "logits"
TOKEN_IDS = "token_ids"  # noqa: S105 - a tensor's name
# An answer from elsewhere without logits: its best tokens, and their log-probabilities.
TOPK_IDS, TOPK_LOGPROBS = "topk_ids", "topk_logprobs"
# Of every position's logits: the greatest, their log-sum-exp, and a sample.
POSITION_RECORDS = ("position_topk_values", "position_logsumexp", "position_sample")

# Records of the greatest logits: TOP_K of them, and fewer in sets of manifest schema 1.
TOPK_RECORDS = tuple(
    f"{of}_topk_{part}" for of in ("position", "step") for part in ("values", "ids")
)
STEP_LOGSUMEXP = "step_logsumexp"  # not in manifest schema 1

# The vocabulary ids of these records. Near-ties may change places; then their values are judged.
PLACES = ("position_topk_ids", "position_sample_ids", "step_topk_ids")

# Of oracle.safetensors, by phase, tensor and dtype: the difference from a float64 run of the
# reference, and the reference's own error in a dtype at each position.
DELTA = "{}.{}.delta"
NOISE = "{}.{}.noise.{}"
# Its error of each step's logits, of each module's input and output (relative), and the same of
# each module by itself, on recorded inputs.
STEP_NOISE = "generate.step_noise.{}"
TAP_NOISE = "taps.noise.{}"
MODULE_NOISE = "modules.noise.{}"

Tensors = dict[str, torch.Tensor]


def input_tensors(prepared: PreparedCase, images: Sequence[Image.Image]) -> Tensors:
    """Return a case's part of inputs.safetensors."""
    inputs = prepared.inputs
    named = {name: getattr(inputs, name) for name in INPUT_NAMES}
    tensors = {name: tensor for name, tensor in named.items() if tensor is not None}
    for index, image in enumerate(images):
        for part, array in to_arrays(image).items():
            tensors[f"image.{index}.{part}"] = torch.from_numpy(array.copy())
    return tensors


def real_positions(inputs: CaseInputs) -> torch.Tensor:
    """Return the indices of the positions without padding, (real,) int64."""
    return inputs.attention_mask[0].nonzero()[:, 0]


def without_padding(tensor: torch.Tensor, inputs: CaseInputs) -> torch.Tensor:
    """Return a tensor of every position, (1, length, width), without those that are padding.

    Any other tensor is returned as it is.
    """
    if tensor.dim() != 3:  # noqa: PLR2004
        return tensor
    return text_without_padding(tensor, inputs.attention_mask)


def real_rows(rows: torch.Tensor, inputs: CaseInputs) -> torch.Tensor:
    """Return the rows (length, …) of positions without padding; no copy if there is none."""
    return rows if bool(inputs.attention_mask.all()) else rows[real_positions(inputs)]


def widened(logits: torch.Tensor) -> torch.Tensor:
    """Return logits in at least float32: a log-sum-exp must not be rounded to half precision."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def position_records(
    logits: torch.Tensor, *, topk_ids: torch.Tensor, sample_ids: torch.Tensor
) -> Tensors:
    """Return POSITION_RECORDS of logits (real, vocabulary) at the given vocabulary ids."""
    # In parts, since it copies: the logits of a long prompt take hundreds of megabytes.
    rows = max(1, _LOGITS_AT_ONCE // logits.shape[-1])
    return {
        "position_topk_values": logits.gather(-1, topk_ids),
        "position_logsumexp": torch.cat([part.logsumexp(-1) for part in torch.split(logits, rows)]),
        "position_sample": logits[:, sample_ids],
    }


def forward_tensors(logits: torch.Tensor, inputs: CaseInputs, *, seed: int) -> Tensors:
    """Return a case's part of forward.safetensors, from all logits (length, vocabulary)."""
    real = real_rows(logits, inputs)
    topk_ids = real.topk(min(TOP_K, real.shape[-1])).indices
    sample_ids = torch.unique(sample_indices(real.shape[-1], seed=seed))
    records = position_records(real, topk_ids=topk_ids, sample_ids=sample_ids)
    ids = {"position_topk_ids": topk_ids, "position_sample_ids": sample_ids}
    return {LOGITS: real[-1], **records, **ids}


def generate_tensors(generation: Generation) -> Tensors:
    """Return a case's part of generate.safetensors: the ids, and records of each step's logits."""
    top = generation.logits.topk(min(TOP_K, generation.logits.shape[-1]))
    return {
        TOKEN_IDS: generation.token_ids,
        "step_topk_values": top.values,
        "step_topk_ids": top.indices,
        STEP_LOGSUMEXP: widened(generation.logits).logsumexp(-1),
    }


def tap_tensors(taps: Sequence[Tap], modules: Sequence[str]) -> Tensors:
    """Return a case's part of taps.safetensors: one row for each module, in order of execution.

    A row's module is an index into `modules`. Shapes are filled up with -1 (all of it if a side has
    no sketch), samples of small tensors with zeros.
    """
    place = {name: index for index, name in enumerate(modules)}
    tensors = {"modules": torch.tensor([place[tap.module] for tap in taps], dtype=torch.int64)}
    for side in Side:
        sketches = [tap.input if side is Side.INPUT else tap.output for tap in taps]
        for name, tensor in stack_sketches(sketches).items():
            tensors[f"{side.value}_{name}"] = tensor
    return tensors


def stack_sketches(sketches: Sequence[Sketch | None]) -> Tensors:
    """Return sketches as one tensor for each of their parts, a row for each sketch."""
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
    sides = [unstack_sketches({p: tensors[f"{side.value}_{p}"] for p in _SKETCH}) for side in Side]
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


def probe_tensors(probes: Sequence[Probe], modules: Sequence[str]) -> Tensors:
    """Return probes.safetensors: one row for each probe, modules as indices into `modules`."""
    dimensions = max((len(probe.shape) for probe in probes), default=0)
    shapes = [(*probe.shape, *[-1] * (dimensions - len(probe.shape))) for probe in probes]
    dtypes = probes[0].noise if probes else {}
    return {
        "modules": torch.tensor([modules.index(probe.module) for probe in probes]),
        "given_shapes": torch.tensor(shapes),
        "sizes": torch.tensor([probe.size for probe in probes], dtype=torch.float64),
        **{f"noise.{d}": torch.tensor([probe.noise[d] for probe in probes]) for d in dtypes},
        **stack_sketches([probe.answer for probe in probes]),
    }


def read_probes(tensors: Mapping[str, torch.Tensor], modules: Sequence[str]) -> list[Probe]:
    """Return what `probe_tensors` laid out."""
    answers = unstack_sketches({part: tensors[part] for part in _SKETCH})
    noise = {n.partition(".")[2]: t.tolist() for n, t in tensors.items() if n.startswith("noise.")}
    rows = zip(
        *(tensors[name].tolist() for name in ("modules", "given_shapes", "sizes")),
        answers,
        strict=True,
    )
    return [
        Probe(
            modules[module],
            tuple(length for length in shape if length >= 0),
            size,
            answer,
            {dtype: errors[row] for dtype, errors in noise.items()},
        )
        for row, (module, shape, size, answer) in enumerate(rows)
        if answer is not None
    ]


def read_inputs(path: Path) -> CaseInputs:
    """Return the inputs kept in a case's part of inputs.safetensors."""
    return as_inputs(unpack_inputs(load_file(path)))


def as_inputs(tensors: Mapping[str, torch.Tensor]) -> CaseInputs:
    """Return the inputs among a case's unpacked tensors of inputs.safetensors."""
    return CaseInputs(**{name: tensors[name] for name in INPUT_NAMES if name in tensors})
