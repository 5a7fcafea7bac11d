"""A golden recorded again keeps its inputs, and loses no phase unnamed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from snapshot_tool.base.errors import UsageError
from snapshot_tool.base.phases import Phase
from snapshot_tool.goldens.golden import Golden, open_golden
from snapshot_tool.goldens.layout import INPUTS
from snapshot_tool.goldens.manifest import Storage
from tests.conftest import set_folder
from tests.record.checkpoints import IDEFICS3, LLAMA, Notes, copy_checkpoint, edit_json, record_here

pytestmark = pytest.mark.record

# Another text at every recording, as a date makes it on another day.
TEMPLATE = "{{ strftime_now('%H:%M:%S.%f') }}. {% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture
def dated(tmp_path: Path) -> Path:
    """Copy a Llama with a chat template that contains the time."""
    folder = copy_checkpoint(LLAMA, tmp_path / "ck")
    edit_json(folder / "tokenizer_config.json", chat_template=TEMPLATE)
    return folder


def open_set(goldens: Path) -> Golden:
    """Open the one golden set."""
    return open_golden(set_folder(goldens))


def test_an_update_of_one_phase_keeps_the_inputs_and_the_other_phases(
    dated: Path, tmp_path: Path
) -> None:
    """What the chat template makes of the prompt now is reported by case."""
    goldens = tmp_path / "goldens"
    before = record_here(dated, goldens, variants=5)
    (chat,) = [case for case in before.cases if case.recipe["chat"] and case.origin == "variant"]
    notes = Notes()
    after = record_here(
        dated, goldens, variants=None, update=True, reason="tokens", notes=notes,
        phase=(Phase.GENERATE,), max_new_tokens=6,
    )  # fmt: skip
    assert after.golden_version == 2
    assert after.files.keys() == before.files.keys()
    same = {name for name in after.files if after.files[name] == before.files[name]}
    assert same == before.files.keys() - {"generate.safetensors"}
    assert [case.text for case in after.cases] == [case.text for case in before.cases]
    (line,) = [line for line in notes.lines if f"case {chat.name}:" in line]
    assert "text, input_ids" in line


def test_another_dtype_keeps_the_inputs(dated: Path, tmp_path: Path) -> None:
    """Both sets share their inputs, whatever the time is."""
    goldens = tmp_path / "goldens"
    one = record_here(dated, goldens, variants=5)
    other = record_here(dated, goldens, variants=None, max_new_tokens=None, dtype="bfloat16")
    assert other.files[INPUTS] == one.files[INPUTS]
    assert [case.text for case in other.cases] == [case.text for case in one.cases]


def test_pixels_are_taken_over_into_another_storage(tmp_path: Path) -> None:
    """A full set that becomes compact keeps the pixels, and back."""
    goldens = tmp_path / "goldens"
    record_here(IDEFICS3, goldens, variants=1, max_new_tokens=1)
    full = open_set(goldens).inputs("one-image")
    for storage in (Storage.COMPACT, Storage.FULL):
        record_here(
            IDEFICS3, goldens, variants=None, max_new_tokens=None, update=True, reason="storage",
            storage=storage,
        )  # fmt: skip
        again = open_set(goldens).inputs("one-image")
        assert full.pixel_values is not None
        assert again.pixel_values is not None
        assert full.pixel_values.equal(again.pixel_values)


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
    tmp_path: Path, options: dict[str, Any]
) -> None:
    """Answers to other inputs cannot be carried over; a phase is dropped only by name."""
    goldens = tmp_path / "goldens"
    record_here(LLAMA, goldens)
    with pytest.raises(UsageError, match="would lack: forward"):
        record_here(
            LLAMA, goldens, update=True, reason="x", phase=(Phase.GENERATE,), fresh=True, **options
        )
    dropped = record_here(
        LLAMA, goldens, update=True, reason="x", phase=(Phase.GENERATE,), fresh=True,
        drop_phase=(Phase.FORWARD,), **options,
    )  # fmt: skip
    assert dropped.files.keys() == {INPUTS, "generate.safetensors"}


def test_a_dropped_phase_goes_although_its_inputs_are_the_same(tmp_path: Path) -> None:
    """And the sketches that belong to it."""
    goldens = tmp_path / "goldens"
    record_here(LLAMA, goldens)
    after = record_here(
        LLAMA, goldens, update=True, reason="x", phase=(Phase.GENERATE,),
        drop_phase=(Phase.FORWARD,), max_new_tokens=3,
    )  # fmt: skip
    assert after.files.keys() == {INPUTS, "generate.safetensors"}
    back = record_here(LLAMA, goldens, update=True, reason="back", drop_phase=(Phase.GENERATE,))
    assert back.files.keys() == {INPUTS, "forward.safetensors", "taps.safetensors"}


def test_whole_outputs_are_kept_by_an_update_of_another_phase(tmp_path: Path) -> None:
    """They belong to the forward pass, which is carried over."""
    goldens = tmp_path / "goldens"
    before = record_here(LLAMA, goldens, whole_outputs=("one-sentence",))
    after = record_here(
        LLAMA, goldens, update=True, reason="x", phase=(Phase.GENERATE,), max_new_tokens=3
    )
    assert after.files["outputs.safetensors"] == before.files["outputs.safetensors"]
