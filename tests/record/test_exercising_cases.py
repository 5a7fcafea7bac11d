"""Cases that reach what short prompts do not: end tokens, lengths, both sides of padding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from snapshot_tool.base.errors import UsageError
from snapshot_tool.base.protocol import Phase
from snapshot_tool.goldens.golden import Golden, open_golden
from tests.conftest import Snap, error_lines
from tests.record.checkpoints import (
    IDEFICS3,
    LLAMA,
    SMALL,
    build_checkpoint,
    copy_checkpoint,
    edit_json,
    open_set,
    record_here,
)

pytestmark = pytest.mark.record


@pytest.mark.parametrize("ends", [[2, 7, 9], 2, None], ids=["three", "one", "none"])
def test_every_set_has_a_generation_that_an_end_token_stops(
    tmp_path: Path, ends: list[int] | int | None
) -> None:
    """By one of the checkpoint's own, or by one of the case's own that the model generates."""
    folder = copy_checkpoint(LLAMA, tmp_path / "ck")
    edit_json(folder / "generation_config.json", eos_token_id=ends)
    if ends is None:
        edit_json(folder / "config.json", eos_token_id=None)
    record_here(folder, tmp_path / "goldens", variants=0, max_new_tokens=8)
    golden = open_set(tmp_path / "goldens")
    case = golden.case("end-token")
    new = golden.tensor("end-token", Phase.GENERATE, "token_ids").tolist()
    stops = golden.eos_token_ids("end-token")
    assert len(new) < 8
    assert new[-1] in stops
    assert not set(new[:-1]) & set(stops)
    if case.eos_token_ids is not None and ends == [2, 7, 9]:
        # The last one of several: a port that knows only the first goes on.
        assert stops[:-1] == (2, 7, 9)
        assert new[-1] == stops[-1]


def test_a_prompt_that_ends_by_itself_is_found(tmp_path: Path) -> None:
    """The tiny Idefics3 was trained to end its answers."""
    record_here(IDEFICS3, tmp_path / "goldens", variants=0, max_new_tokens=6)
    golden = open_set(tmp_path / "goldens")
    assert golden.case("end-token").eos_token_ids is None
    new = golden.tensor("end-token", Phase.GENERATE, "token_ids").tolist()
    assert new[-1] in golden.manifest.generation.eos_token_ids


def test_a_set_in_another_dtype_finds_its_own_end_token(tmp_path: Path) -> None:
    """The tokens that it generates may be others."""
    goldens = tmp_path / "goldens"
    record_here(LLAMA, goldens, max_new_tokens=8)
    record_here(LLAMA, goldens, variants=None, max_new_tokens=None, dtype="bfloat16")
    (folder,) = goldens.glob("*/*/cpu-bfloat16")
    golden = open_golden(folder)
    new = golden.tensor("end-token", Phase.GENERATE, "token_ids").tolist()
    assert len(new) < 8
    assert new[-1] in golden.eos_token_ids("end-token")


def test_prompts_of_a_file_and_of_a_length_are_cases(snap: Snap, tmp_path: Path) -> None:
    """Each line is one; a long prompt has hardly more tokens than were named."""
    (tmp_path / "prompts.txt").write_text("first prompt\n\nsecond prompt, longer\n", "utf-8")
    (tmp_path / "more.json").write_text(json.dumps(["of two\nlines", "first prompt"]), "utf-8")
    goldens = tmp_path / "goldens"
    options = ("--checkpoint", LLAMA, "--goldens", goldens, *SMALL)
    run = snap(
        "record", *options, "--prompt", tmp_path / "prompts.txt", "--prompt",
        tmp_path / "more.json", "--long", 150, "--long", 200,
    )  # fmt: skip
    assert run.code == 0, run.err
    cases = {case.name: case for case in open_set(goldens).manifest.cases}
    texts = [cases[f"prompt-{number:02}"].text for number in (1, 2, 3)]
    assert texts == ["first prompt", "second prompt, longer", "of two\nlines"]
    assert "prompt-04" not in cases
    assert 150 <= cases["long-150"].tokens < 180
    assert 200 <= cases["long-200"].tokens < 230


def test_prompts_can_be_added_to_a_recorded_set(tmp_path: Path) -> None:
    """The other cases keep their inputs; those that are there already are not doubled."""
    goldens = tmp_path / "goldens"
    before = record_here(LLAMA, goldens, prompts=("one prompt",))
    after = record_here(
        LLAMA, goldens, update=True, reason="more", prompts=("one prompt", "two"), long=(50,)
    )
    names = [case.name for case in after.cases]
    assert names == [*(case.name for case in before.cases), "prompt-02", "long-50"]
    again = record_here(LLAMA, goldens, update=True, reason="no more", prompts=("two",), long=(50,))
    assert again.golden_version == 2


def test_a_prompt_with_a_placeholder_has_an_image(tmp_path: Path) -> None:
    """One of the fixed cases' images; to a model without images it is text."""
    manifest = record_here(
        IDEFICS3, tmp_path / "goldens", variants=0, max_new_tokens=1, prompts=("Is <image> red?",)
    )
    assert manifest.cases[-1].images == 1


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"\xff\xfe", "cannot be read"), (b"\n \n", "has no prompts"), (None, "cannot be read")],
)
def test_a_file_without_prompts_is_refused(
    snap: Snap, tmp_path: Path, content: bytes | None, problem: str
) -> None:
    """Before anything is loaded."""
    if content is not None:
        (tmp_path / "prompts.txt").write_bytes(content)
    run = snap("record", "--checkpoint", LLAMA, "--prompt", tmp_path / "prompts.txt")
    assert run.code == 2
    assert problem in error_lines(run)[0]


def test_a_prompt_longer_than_the_model_takes_is_refused_by_name(tmp_path: Path) -> None:
    """The user named it: it is not left out."""
    with pytest.raises(UsageError, match=r"refuses case long-5000: \d+ tokens, the model takes"):
        record_here(LLAMA, tmp_path / "goldens", variants=0, long=(5000,))


def test_encoders_are_padded_on_both_sides_and_tell_two_texts_apart(tmp_path: Path) -> None:
    """Token types reach the reference: with them zero it answers otherwise."""
    folder = build_checkpoint("bert", tmp_path)
    record_here(folder, tmp_path / "goldens", variants=3)
    golden = open_set(tmp_path / "goldens")
    masks = [golden.inputs(case.name).attention_mask[0] for case in golden.manifest.cases]
    assert any(mask[0] == 0 for mask in masks)
    assert any(mask[-1] == 0 for mask in masks)
    inputs = golden.inputs("two-texts")
    assert inputs.token_type_ids is not None
    assert inputs.token_type_ids.shape == inputs.input_ids.shape
    assert set(inputs.token_type_ids[0].tolist()) == {0, 1}
    assert golden.inputs("one-sentence").token_type_ids is None
    recorded = golden.tensor("two-texts", Phase.FORWARD, "last_hidden_state")
    assert not torch.allclose(recorded, without_types(folder, golden), atol=1e-3)


def without_types(folder: Path, golden: Golden) -> torch.Tensor:
    """Return what BERT makes of the two texts without token types."""
    from transformers import BertForMaskedLM

    inputs = golden.inputs("two-texts")
    model = BertForMaskedLM.from_pretrained(folder).eval()
    with torch.no_grad():
        answer = model.bert(inputs.input_ids, inputs.attention_mask)
    hidden: torch.Tensor = answer.last_hidden_state
    return hidden[:, inputs.attention_mask[0].bool()]
