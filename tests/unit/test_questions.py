"""Derived questions as text, which --replay parses."""

from __future__ import annotations

import pytest

from snapshot_tool.base.errors import UsageError
from snapshot_tool.base.protocol import Phase
from snapshot_tool.explore.questions import (
    KINDS,
    Batch,
    Chunks,
    ConnectorTiles,
    GenerationBatch,
    Padding,
    Prefix,
    Question,
    Resumed,
    ResumedChunks,
    Shorter,
    Split,
    VisionTiles,
    parse_question,
)
from snapshot_tool.explore.recorded import Prompt

FORMS: dict[str, Question] = {
    "prefix:one-image@12": Prefix(Prompt("one-image", 12)),
    "padding:one-image@12+3": Padding(Prompt("one-image", 12, 3)),
    "split:one-image@12+3:5": Split(Prompt("one-image", 12, 3), 5),
    "batch:one-image@12,text@7": Batch((Prompt("one-image", 12), Prompt("text", 7))),
    "tiles:one-image:0,3,2": VisionTiles("one-image", (0, 3, 2)),
    "connector-tiles:one-image:4": ConnectorTiles("one-image", (4,)),
    "shorter:one-image:5": Shorter("one-image", 5),
    "resumed:one-image:5": Resumed("one-image", 5),
    "generation-batch:one-image,text:5": GenerationBatch(("one-image", "text"), 5),
    "chunks:one-image@12+3:5:1": Chunks(Prompt("one-image", 12, 3), 5, 1),
    "resumed-chunks:one-image:5:7:1": ResumedChunks("one-image", 5, 7, 1),
}


@pytest.mark.parametrize(("text", "question"), FORMS.items())
def test_the_text_form_of_a_question_parses_back(text: str, question: Question) -> None:
    """Both ways, for each kind."""
    assert str(question) == text
    assert parse_question(text) == question
    assert question.first_case == "one-image"


def test_every_kind_has_a_text_form_a_phase_and_a_method() -> None:
    """The table above is complete, and the example of each kind is valid."""
    assert {type(question) for question in FORMS.values()} == set(KINDS.values())
    assert all(type(parse_question(kind.example)) is kind for kind in KINDS.values())
    assert {kind.phase for kind in KINDS.values()} == set(Phase) - {Phase.PREPROCESSING}
    assert {kind.kind for kind in KINDS.values()} == set(KINDS)


@pytest.mark.parametrize(
    "text",
    [
        *("", "prefix", "suffix:one-image@1", "prefix:one-image", "prefix:one-image@-1"),
        *("prefix:one-image@1:2", "tiles:one-image:", "split:one-image@3:x", "batch:a@1,b"),
    ],
)
def test_an_invalid_question_is_a_usage_error_with_an_example(text: str) -> None:
    """One line is about the problem, the next is an example."""
    with pytest.raises(UsageError, match="is not a valid question") as error:
        parse_question(text)
    assert error.value.remedy
