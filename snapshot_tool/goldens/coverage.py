"""What the cases of a golden set reach of a model, and what none of them does. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from snapshot_tool.base.errors import GoldenDamaged
from snapshot_tool.base.protocol import (
    ALL_END_TOKENS,
    END_TOKEN,
    LEFT,
    RIGHT,
    ROPE,
    TOKEN_TYPES,
    WINDOW,
    Phase,
)
from snapshot_tool.base.report import Coverage
from snapshot_tool.families.family import text_config
from snapshot_tool.goldens.layout import phase_file
from snapshot_tool.goldens.manifest import CaseEntry, Manifest, case_recipe
from snapshot_tool.goldens.tensors import open_tensors

_WINDOWS = ("sliding_window", "attention_chunk_size")
# Rotary embeddings that change beyond a length; others scale every position alike.
_LENGTH_DEPENDENT = ("dynamic", "longrope", "su")


def coverage(
    manifest: Manifest, cases: Sequence[CaseEntry], generated: Mapping[str, Sequence[int]]
) -> tuple[Coverage, ...]:
    """Return what some cases of a golden set reach, and what they do not.

    generated: the recorded new tokens, by case; see `generated_tokens`.

    Only what the recorded model has is listed: a model without a sliding window has no line for it.
    """
    found: list[Coverage] = []
    if Phase.GENERATE in manifest.tolerances:
        found += _end_tokens(manifest, cases, generated)
    if Phase.FORWARD in manifest.tolerances:
        # Of a prompt and its new tokens.
        lengths = [case.tokens + len(generated.get(case.name, ())) for case in cases]
        longest = max(lengths, default=0)
        found += [
            Coverage(
                name,
                longest > limit,
                f"{field} {limit} {'exceeded' if longest > limit else 'never exceeded'}: "
                f"the longest case has {longest} tokens",
            )
            for name, field, limit in _limits(manifest.checkpoint.config)
        ]
        found += _padding(manifest, cases)
    return tuple(found)


def generated_tokens(folder: Path, manifest: Manifest) -> dict[str, tuple[int, ...]]:
    """Return the recorded new tokens of each case of the golden set in a folder."""
    name = phase_file(Phase.GENERATE)
    if name not in manifest.files:
        return {}
    tokens = {}
    file = open_tensors(folder / name)
    with file.file:
        for case in manifest.cases:
            key = f"{case.name}/token_ids"
            span = file.spans.get(key)
            if span and span.dtype != "I64":
                raise GoldenDamaged(f"{file.path}: {key} is {span.dtype}, not I64")
            if span:
                # Not by numpy, which `snap show` would have to import.
                data = os.pread(file.file.fileno(), span.end - span.start, span.start)
                tokens[case.name] = tuple(memoryview(data).cast("q"))
    return tokens


def _end_tokens(
    manifest: Manifest, cases: Sequence[CaseEntry], generated: Mapping[str, Sequence[int]]
) -> Iterator[Coverage]:
    """Yield how many generations end tokens stop early, and which tokens those are."""
    own = set(manifest.generation.eos_token_ids)
    if phase_file(Phase.GENERATE) not in manifest.files:
        return
    generations = [case for case in cases if Phase.GENERATE in case.phases]
    last = [
        ids[-1]
        for case in generations
        if 0 < len(ids := generated.get(case.name, ())) < manifest.generation.max_new_tokens
        and ids[-1] in manifest.eos_token_ids(case)
    ]
    missed = own - set(last)
    yield Coverage(
        END_TOKEN, bool(last), f"an end token stops {len(last)} of {len(generations)} generations"
    )
    if own:
        what = f"never generated: {_listed(missed)}" if missed else f"all generated: {_listed(own)}"
        yield Coverage(ALL_END_TOKENS, not missed, f"end tokens of the checkpoint {what}")


def _listed(ids: set[int]) -> str:
    return ", ".join(map(str, sorted(ids)))


def _limits(config: Mapping[str, Any]) -> Iterator[tuple[str, str, int]]:
    """Yield the name, the field and the value of each length at which a model changes."""
    own = text_config(config)
    if own.get("use_sliding_window") is not False:
        for field in _WINDOWS:
            if _is_length(own.get(field)):
                yield WINDOW, field, own[field]
    rope = own.get("rope_scaling")
    if isinstance(rope, Mapping):
        kind = rope.get("rope_type", rope.get("type"))
        field = "original_max_position_embeddings"
        value = rope.get(field, own.get(field))
        if not _is_length(value):
            field, value = "max_position_embeddings", own.get("max_position_embeddings")
        if kind in _LENGTH_DEPENDENT and _is_length(value):
            yield ROPE, f"{kind} rope's {field}", int(value)


def _is_length(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _padding(manifest: Manifest, cases: Sequence[CaseEntry]) -> Iterator[Coverage]:
    """Yield the sides of padding and, of encoders, the token types that occur."""
    recipes = [case_recipe(case).recipe for case in cases]
    left = sum(recipe.left_padding > 0 for recipe in recipes)
    yield Coverage(LEFT, left > 0, f"{left} of {len(recipes)} prompts are padded on the left")
    if Phase.GENERATE in manifest.tolerances:
        return
    right = sum(recipe.right_padding > 0 for recipe in recipes)
    yield Coverage(RIGHT, right > 0, f"{right} of {len(recipes)} prompts are padded on the right")
    kinds = manifest.checkpoint.config.get("type_vocab_size")
    if isinstance(kinds, int) and kinds > 1:
        two = sum(bool(recipe.second) for recipe in recipes)
        yield Coverage(
            TOKEN_TYPES, two > 0, f"{two} of {len(recipes)} prompts have two texts (token types)"
        )
