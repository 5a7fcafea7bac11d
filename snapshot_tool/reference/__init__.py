"""The Hugging Face side: the only package that imports transformers or accelerate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from snapshot_tool.base.environment import Processes, rank_here
from snapshot_tool.base.errors import ReferenceUnavailable
from snapshot_tool.base.protocol import LoadSettings

if TYPE_CHECKING:
    from snapshot_tool.reference.huggingface import HuggingFaceReference


def load_reference(checkpoint: Path, *, dtype: str, settings: LoadSettings) -> HuggingFaceReference:
    """Load the model of a checkpoint's folder; raise ReferenceUnavailable without Hugging Face."""
    try:
        from snapshot_tool.reference.huggingface import HuggingFaceReference
    except ImportError as error:
        raise _lacking(error) from error
    return HuggingFaceReference.load(checkpoint, dtype=dtype, settings=settings)


def join_processes(device: str) -> Processes:
    """Return this process among those that were started together; raise as `load_reference`."""
    if rank_here() is None:
        return Processes()
    try:
        from snapshot_tool.reference.processes import LaunchedProcesses
    except ImportError as error:
        raise _lacking(error) from error
    return LaunchedProcesses(device)


def _lacking(error: ImportError) -> ReferenceUnavailable:
    return ReferenceUnavailable(
        f"recording needs transformers and accelerate, which are not installed: {error}",
        "use the record environment; to make one, in a checkout of snap: make setup",
    )
