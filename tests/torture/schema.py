"""Manifests that follow the schema, drawn by hypothesis: valid on their face, senseless within."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from snapshot_tool.base.phases import PHASES
from snapshot_tool.base.recipes import CaseRecipe, ImageRecipe
from snapshot_tool.base.tolerance import PhaseTolerance, Tolerance
from snapshot_tool.goldens.manifest import (
    CaseEntry,
    CheckpointEntry,
    Draws,
    FileEntry,
    GenerationEntry,
    HistoryEntry,
    Manifest,
    TapsEntry,
    TensorEntry,
    to_builtins,
)

_COUNTS = st.one_of(st.integers(0, 4), st.integers(0, 2**53))
_TEXT = st.text(max_size=20)
_DIGESTS = st.sampled_from(("a" * 64, "0123456789abcdef" * 4))
_CASES = st.from_regex(r"[a-z0-9][a-z0-9-]{0,8}", fullmatch=True)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | _TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=8,
)
_TENSORS = st.builds(
    TensorEntry,
    shape=st.lists(_COUNTS, max_size=5).map(tuple),
    dtype=st.sampled_from(("F32", "I64", "U8", "BOOL", "F999")),
    sha256=_DIGESTS,
)
_NAMES = st.sampled_from(
    ("input_ids", "attention_mask", "pixel_values", "logits", "token_ids", "image.0.pixels", "x")
)
_TOLERANCES = st.builds(
    Tolerance, atol=st.floats(0, allow_infinity=False), rtol=st.floats(0, allow_infinity=False)
)


def _files(case: str) -> SearchStrategy[dict[str, FileEntry]]:
    keys = st.one_of(_NAMES.map(lambda name: f"{case}/{name}"), _TEXT)
    names = st.sampled_from(("inputs", "taps", "../inputs", "oracle", *PHASES))
    entries = st.builds(
        FileEntry,
        size=_COUNTS,
        sha256=_DIGESTS,
        tensors=st.dictionaries(keys, _TENSORS, max_size=4),
    )
    return st.dictionaries(names.map(lambda name: f"{name}.safetensors"), entries, max_size=4)


def _case(name: str) -> SearchStrategy[CaseEntry]:
    image = ImageRecipe("checkerboard", 8192, 2048, "P", 7)
    recipes = st.sampled_from(
        (
            to_builtins(CaseRecipe("a")),
            to_builtins(CaseRecipe("<image>" * 60, (image,) * 60, chat=True, left_padding=4096)),
            {"prompt": "<image>", "images": [{"kind": "noise", "width": 10**9, "height": 1}]},
        )
    )
    return st.builds(
        CaseEntry,
        name=st.just(name),
        origin=_TEXT,
        recipe=st.one_of(recipes, _JSON),
        text=_TEXT,
        phases=st.lists(st.sampled_from(PHASES), max_size=5).map(tuple),
        images=st.sampled_from((0, 0, 60, 2**53)),
        tiles=_COUNTS,
        tokens=_COUNTS,
        generated=_TEXT,
    )


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    """Draw a manifest; about every second one is taken by the reader."""
    names = draw(st.lists(_CASES, min_size=1, max_size=3))
    return Manifest(
        schema_version=draw(st.sampled_from((1, 1, 1, 1, 2, 2**53))),
        golden_version=draw(st.integers(1, 2**53)),
        history=draw(
            st.lists(
                st.builds(
                    HistoryEntry,
                    version=st.integers(1, 9),
                    when=st.sampled_from(("2025-01-01", "9999-99-99")),
                    reason=_TEXT,
                    moved=st.lists(_TEXT, max_size=2).map(tuple),
                ),
                max_size=2,
            ).map(tuple)
        ),
        checkpoint=CheckpointEntry(
            name="local/tiny",
            revision="0123456789abcdef" * 4,
            family=draw(st.sampled_from(("idefics3", "llama", "x"))),
            location=draw(st.sampled_from((None, "checkpoint", ".", "goldens", "a/b"))),
            files=draw(st.dictionaries(st.sampled_from(("config.json", "a\nb")), _DIGESTS)),
            config=draw(st.dictionaries(_TEXT, _JSON, max_size=3)),
        ),
        device=draw(st.sampled_from(("cpu", "cpu", "cuda", "tpu"))),
        dtype=draw(st.sampled_from(("float32", "float32", "bfloat16", "x"))),
        seed=draw(_COUNTS),
        environment=draw(st.dictionaries(st.sampled_from(("torch", "processor")), _TEXT)),
        draws=Draws(
            variants=draw(_COUNTS),
            refused=draw(_COUNTS),
            reasons=draw(st.dictionaries(_TEXT, _COUNTS, max_size=2)),
        ),
        generation=GenerationEntry(
            max_new_tokens=draw(st.integers(1, 2**53)),
            eos_token_ids=draw(st.lists(st.integers(-1, 2**31), max_size=2).map(tuple)),
            pad_token_id=draw(st.integers(-1, 2**31)),
        ),
        cases=tuple(draw(_case(name)) for name in names),
        tolerances={
            phase: draw(st.builds(PhaseTolerance, single=_TOLERANCES, several_images=_TOLERANCES))
            for phase in draw(st.sampled_from((PHASES, PHASES, PHASES[:2])))
        },
        taps=TapsEntry(seed=draw(_COUNTS), modules=draw(st.lists(_TEXT, max_size=2).map(tuple))),
        files=draw(_files(names[0])),
    )
