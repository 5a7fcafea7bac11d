"""A short training, so that greedy answers have something to say and near-ties are rare."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from builder.language import Example, draw_several, draw_single, draw_text
from builder.tokenizer import END_OF_UTTERANCE

STEPS = 500
PEAK_RATE = 3e-3
WARM_UP = 30  # steps
# Answers are certain in training; without smoothing logits grow, and their rounding with them.
LABEL_SMOOTHING = 0.02
IGNORED = -100

_BATCHES: tuple[tuple[tuple[Callable[[np.random.RandomState], Example], int], ...], ...] = (
    ((draw_single, 8),),
    ((draw_several, 3), (draw_text, 6)),
)


def _encode(example: Example, processor: Any) -> tuple[list[int], int, list[Tensor]]:
    """Return the ids of prompt and answer, the length of the prompt, and the tiles.

    The answer is encoded apart, as the model will meet it when it generates.
    """
    images = [list(example.images)] if example.images else None
    inputs = processor(text=[example.prompt], images=images, return_tensors="pt")
    prompt: list[int] = inputs["input_ids"][0].tolist()
    answer: list[int] = processor.tokenizer(example.answer + END_OF_UTTERANCE)["input_ids"]
    tiles = [inputs["pixel_values"][0]] if example.images else []
    return prompt + answer, len(prompt), tiles


def _collate(examples: list[Example], processor: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Return the model's inputs, padded on the right, and the labels: answers only."""
    encoded = [_encode(example, processor) for example in examples]
    shape = (len(encoded), max(len(ids) for ids, _, _ in encoded))
    input_ids = torch.full(shape, processor.tokenizer.pad_token_id)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORED)
    for row, (ids, start, _) in enumerate(encoded):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        attention_mask[row, : len(ids)] = 1
        labels[row, start : len(ids)] = torch.tensor(ids[start:])
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    tiles = [tile for _, _, found in encoded for tile in found]
    if tiles:
        # The model only flattens the tiles: one row with all of them needs no padding tiles.
        inputs["pixel_values"] = torch.cat(tiles)[None]
    return inputs, labels


def _loss(model: Any, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    logits: Tensor = model(**inputs, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]),
        labels[:, 1:].reshape(-1),
        ignore_index=IGNORED,
        label_smoothing=LABEL_SMOOTHING,
    )


def _optimizer(model: Any) -> torch.optim.AdamW:
    """Return AdamW that decays matrices only: biases and norms must not shrink to nothing."""
    parameters = list(model.parameters())
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=PEAK_RATE,
        betas=(0.9, 0.98),
    )


def _rate(step: int) -> float:
    """Return the factor of the learning rate: a linear rise, then half a cosine."""
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (step - WARM_UP) / (STEPS - WARM_UP))) + 1e-3


def train(model: Any, processor: Any, *, seed: int) -> float:
    """Train the model in place, on examples drawn from the seed, and return the seconds it took."""
    state = np.random.RandomState(seed)
    optimizer = _optimizer(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _rate)
    start = time.perf_counter()
    model.train()
    for step in range(STEPS):
        optimizer.zero_grad()
        losses = []
        for batch in _BATCHES:
            examples = [draw(state) for draw, count in batch for _ in range(count)]
            loss = _loss(model, *_collate(examples, processor))
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == STEPS - 1:
            print(
                f"step {step:4d}  loss {losses[0]:.3f} (one image)  {losses[1]:.3f} (several, text)"
                f"  {time.perf_counter() - start:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    model.eval()
    return time.perf_counter() - start
