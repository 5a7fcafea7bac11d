"""How far it is from the command to the work: frames of snap's own on the stack."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch.overrides import TorchFunctionMode

import snapshot_tool
from snapshot_tool.cli.commands import cli
from tests.conftest import CHECKOUT, GOLDENS

MOST = 8
PACKAGE = str(Path(snapshot_tool.__file__).parent)
SUBTRACTIONS = {"sub", "__sub__", "subtract"}


def snaps_frames(frame: FrameType | None) -> list[str]:
    """Return the functions of snap's own that are running, the innermost first."""
    found = []
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGE):
            found.append(frame.f_code.co_qualname)
        frame = frame.f_back
    return found


class SubtractionStacks(TorchFunctionMode):
    """Keeps the stack of every subtraction of two float64 tensors, as snap compares them."""

    def __init__(self) -> None:
        super().__init__()
        self.stacks: list[list[str]] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the function, keeping the stack if it subtracts."""
        if getattr(func, "__name__", "") in SUBTRACTIONS and all(
            isinstance(value, torch.Tensor) and value.dtype == torch.float64 for value in args[:2]
        ):
            self.stacks.append(snaps_frames(sys._getframe(1)))
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def stacks() -> dict[str, list[list[str]]]:
    """Check one phase of one case in this process; return the stacks by what was done there."""
    loads: list[list[str]] = []

    def watch(frame: FrameType, event: str, _argument: object) -> None:
        is_load = event == "call" and frame.f_code.co_name == "get_model"
        if is_load and frame.f_code.co_filename.startswith(str(CHECKOUT.resolve())):
            loads.append(snaps_frames(frame))

    options = ["--goldens", str(GOLDENS), "--case", "one-image", "--phase", "connector"]
    sys.setprofile(watch)
    try:
        with SubtractionStacks() as subtractions:
            run = CliRunner().invoke(cli, ["check", "--fms-path", str(CHECKOUT), *options])
    finally:
        sys.setprofile(None)
    assert "PASS" in run.output, run.output
    return {"subtraction": subtractions.stacks, "load": loads}


@pytest.mark.parametrize("what", ["subtraction", "load"])
def test_the_command_is_at_most_eight_frames_from_the_work(
    stacks: dict[str, list[list[str]]], what: str
) -> None:
    """From `snap check` to the subtraction of two tensors, and to FMS's loading of the model."""
    assert stacks[what]
    longest = max(stacks[what], key=len)
    assert longest[-1] == "check_command"
    assert len(longest) <= MOST, longest
