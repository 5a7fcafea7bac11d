"""A golden recorded again keeps its inputs, and loses no phase unnamed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from snapshot_tool.base.errors import GoldenExists, InputRefused, UsageError
from snapshot_tool.base.protocol import Phase
from snapshot_tool.goldens.layout import INPUTS, phase_file
from snapshot_tool.goldens.manifest import Storage
from snapshot_tool.reference.huggingface import HuggingFaceReference
from tests.record.checkpoints import (
    IDEFICS3,
    LLAMA,
    Notes,
    copy_checkpoint,
    edit_json,
    open_set,
    record_here,
)
from tests.unit.factory import rewrite

pytestmark = pytest.mark.record

# Another text at every recording, as a date makes it on another day.
TEMPLATE = "{{ strftime_now('%H:%M:%S.%f') }}. {% for m in messages %}{{ m.content }}{% endfor %}"
UPDATE: dict[str, Any] = {"update": True, "reason": "x", "variants": None, "max_new_tokens": None}


def test_an_update_and_another_dtype_keep_the_inputs(tmp_path: Path) -> None:
    """A prompt that the chat template would change now is reported by case."""
    dated = copy_checkpoint(LLAMA, tmp_path / "ck")
    edit_json(dated / "tokenizer_config.json", chat_template=TEMPLATE)
    goldens = tmp_path / "goldens"
    before = record_here(dated, goldens, variants=5)
    (chat,) = [case for case in before.cases if case.recipe["chat"] and case.origin == "variant"]
    notes = Notes()
    after = record_here(
        dated, goldens, notes=notes, phase=(Phase.GENERATE,), **{**UPDATE, "max_new_tokens": 6}
    )
    assert after.golden_version == 2
    assert after.files.keys() == before.files.keys()
    same = {name for name in after.files if after.files[name] == before.files[name]}
    assert same == before.files.keys() - {"generate.safetensors"}
    assert [case.text for case in after.cases] == [case.text for case in before.cases]
    (line,) = [line for line in notes.lines if f"case {chat.name}:" in line]
    assert "text, input_ids" in line
    other = record_here(dated, goldens, variants=None, max_new_tokens=None, dtype="bfloat16")
    assert other.files[INPUTS] == before.files[INPUTS]
    assert [case.text for case in other.cases] == [case.text for case in before.cases]


def test_a_case_that_the_processor_no_longer_takes_is_kept(
    llama_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another release may refuse a prompt: it is reported by case, and its inputs stay."""
    before = open_set(llama_copy).manifest

    def refuse(*_given: Any, **_options: Any) -> None:
        raise InputRefused("ValueError: unsupported")

    monkeypatch.setattr(HuggingFaceReference, "prepare", refuse)
    notes = Notes()
    after = record_here(LLAMA, llama_copy, notes=notes, **{**UPDATE, "max_new_tokens": 3})
    assert after.files[INPUTS] == before.files[INPUTS]
    for case in before.cases:
        assert any(f"case {case.name}:" in line for line in notes.lines)


@pytest.mark.parametrize("options", [{"redraw": True, "long": (40,)}, {"variants": 3}])
def test_sets_that_share_their_inputs_keep_them(llama_copy: Path, options: dict[str, Any]) -> None:
    """The set beside it in another dtype would belong to other inputs."""
    record_here(LLAMA, llama_copy, dtype="bfloat16", phase=(Phase.GENERATE,))
    with pytest.raises(GoldenExists, match="shares the inputs"):
        record_here(LLAMA, llama_copy, **{**UPDATE, **options})


def test_pixels_are_taken_over_into_another_storage(small_copy: Path) -> None:
    """A full set that becomes compact keeps the pixels, and back."""
    full = open_set(small_copy).inputs("one-image").pixel_values
    assert full is not None
    for storage in (Storage.COMPACT, Storage.FULL):
        record_here(IDEFICS3, small_copy, **UPDATE, storage=storage)
        again = open_set(small_copy).inputs("one-image").pixel_values
        assert again is not None
        assert full.equal(again)


@pytest.mark.parametrize(
    "options",
    [
        {"redraw": True},
        {"variants": 3},
        {"storage": Storage.COMPACT},
        {"prompts": ("another prompt",)},
    ],
    ids=["redraw", "variants", "storage", "prompt"],
)
def test_an_update_that_would_lose_a_phase_is_refused(
    llama_copy: Path, options: dict[str, Any]
) -> None:
    """Answers to other inputs cannot be carried over; a phase is dropped only by name."""
    options = {"phase": (Phase.GENERATE,), "fresh": True, **UPDATE, **options}
    with pytest.raises(UsageError, match="would lack: forward"):
        record_here(LLAMA, llama_copy, **options)
    dropped = record_here(LLAMA, llama_copy, **options, drop_phase=(Phase.FORWARD,))
    assert dropped.files.keys() == {INPUTS, "generate.safetensors"}


def test_a_dropped_phase_goes_although_its_inputs_are_the_same(llama_copy: Path) -> None:
    """And the sketches that belong to it."""
    options = {**UPDATE, "max_new_tokens": 3}
    after = record_here(
        LLAMA, llama_copy, phase=(Phase.GENERATE,), drop_phase=(Phase.FORWARD,), **options
    )
    assert after.files.keys() == {INPUTS, "generate.safetensors"}
    back = record_here(LLAMA, llama_copy, drop_phase=(Phase.GENERATE,), **options)
    parts = ("forward", "taps", "probes")
    assert back.files.keys() == {INPUTS, *(f"{part}.safetensors" for part in parts)}


def test_whole_outputs_are_kept_by_an_update_of_another_phase(tmp_path: Path) -> None:
    """They belong to the forward pass, which is carried over."""
    goldens = tmp_path / "goldens"
    before = record_here(LLAMA, goldens, whole_outputs=("one-sentence",))
    options = {**UPDATE, "max_new_tokens": 3}
    after = record_here(LLAMA, goldens, phase=(Phase.GENERATE,), **options)
    assert after.files["outputs.safetensors"] == before.files["outputs.safetensors"]


def test_an_update_accepts_some_cases_and_leaves_the_others(tmp_path: Path) -> None:
    """A golden whose answers are off in two cases, as those of another release would be."""
    goldens = tmp_path / "goldens"
    record_here(LLAMA, goldens, variants=2)
    golden = open_set(goldens)
    first, second, *_ = golden.cases
    before = {name: golden.tensor(name, Phase.FORWARD, "logits").clone() for name in golden.cases}

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in (first, second):
            tensors[f"{name}/logits"] += 1

    rewrite(golden.folder, phase_file(Phase.FORWARD), change)
    notes = Notes()
    record_here(LLAMA, goldens, notes=notes, case=[first], **{**UPDATE, "variants": 2})
    after = open_set(goldens)
    assert after.manifest.golden_version == 2
    accepted, left = (after.tensor(name, Phase.FORWARD, "logits") for name in (first, second))
    assert torch.equal(accepted, before[first])
    assert torch.equal(left, before[second] + 1)
    assert after.cases[second] == golden.cases[second]
    assert any("cases keep their recorded answers" in line for line in notes.lines)
    for options in ({"case": ["nothing"]}, {"case": [first], "max_new_tokens": 3}):
        with pytest.raises(UsageError):
            record_here(LLAMA, goldens, **{**UPDATE, "variants": 2, **options})
