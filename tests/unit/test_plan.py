"""Cases of an earlier recording are taken over, whatever the processor makes of them now."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from snapshot_tool.base.errors import InputRefused
from snapshot_tool.base.protocol import CaseInputs, PreparedCase, Progress
from snapshot_tool.base.recipes import CaseRecipe
from snapshot_tool.goldens import parts
from snapshot_tool.goldens.golden import Golden, open_golden
from snapshot_tool.goldens.layout import INPUTS
from snapshot_tool.record.cases import make_plan
from snapshot_tool.record.plan import Earlier, Plan, Settings, Staging
from tests.unit.factory import write_golden


class Notes(Progress):
    """Keeps what would be printed."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, message: str) -> None:
        self.lines.append(message)


class Processor:
    """A reference of which only the processor is needed: every prompt becomes these ids."""

    def __init__(self, prepare: Callable[[CaseRecipe], PreparedCase]) -> None:
        self._prepare = prepare

    def prepare(
        self, recipe: CaseRecipe, images: Sequence[Image.Image], *, new_tokens: int = 0
    ) -> PreparedCase:
        return self._prepare(recipe)

    def warnings(self) -> tuple[str, ...]:
        return ()

    def info(self) -> object:
        return type("Info", (), {"phases": ()})()


def other_ids(recipe: CaseRecipe) -> PreparedCase:
    """Return what another tokenizer makes of a prompt."""
    ids = torch.tensor([[9, 9]])
    return PreparedCase("other text", CaseInputs(ids, torch.ones_like(ids)), torch.zeros(0, 2))


def refuse(recipe: CaseRecipe) -> PreparedCase:
    """Refuse every prompt, as a processor of another release may."""
    raise InputRefused("ValueError: Unsupported number of image dimensions: 2")


@pytest.fixture
def golden(tmp_path: Path) -> Golden:
    """Write a golden set of two cases, one of them with images."""
    return open_golden(write_golden(tmp_path / "goldens"))


def plan_again(
    folder: Path, golden: Golden, prepare: Callable[[CaseRecipe], PreparedCase], notes: Notes
) -> tuple[Plan, Staging]:
    """Plan a recording that replaces a golden set."""
    settings = Settings(
        revision=golden.manifest.checkpoint.revision,
        seed=golden.manifest.seed,
        variants=golden.manifest.draws.variants,
        max_new_tokens=4,
        phases=(),
        environment={},
    )
    staging = Staging(folder)
    staging.folder.mkdir()
    plan = make_plan(
        staging,
        settings,
        reference=Processor(prepare),  # type: ignore[arg-type]
        earlier=Earlier(golden),
        redraw=False,
        progress=notes,
    )
    return plan, staging


@pytest.mark.parametrize("prepare", [other_ids, refuse])
def test_recorded_inputs_are_asked_again_and_what_differs_is_reported_by_case(
    tmp_path: Path, golden: Golden, prepare: Callable[[CaseRecipe], PreparedCase]
) -> None:
    """A tokenizer that makes other ids of a prompt, or takes it no more, changes nothing."""
    notes = Notes()
    plan, staging = plan_again(tmp_path / "staging", golden, prepare, notes)
    assert [case.name for case in plan.cases] == [case.name for case in golden.manifest.cases]
    assert [case.text for case in plan.cases] == [case.text for case in golden.manifest.cases]
    for case in plan.cases:
        staged, recorded = (
            parts.read_inputs(staging.part(case.name, INPUTS)),
            golden.inputs(case.name),
        )
        assert torch.equal(staged.input_ids, recorded.input_ids)
        assert torch.equal(staged.attention_mask, recorded.attention_mask)
        assert (staged.pixel_values is None) == (recorded.pixel_values is None)
        assert any(f"case {case.name}:" in line for line in notes.lines)
