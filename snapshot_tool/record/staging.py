"""Where a recording keeps what it has so far: one small file for each case and file of the set.

A killed recording leaves whole parts only, and `--resume` asks for the missing ones alone.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from snapshot_tool.base.errors import SnapError
from snapshot_tool.goldens.transaction import make_folder, sync_folder, write_atomically

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Staging:
    """The folder of one unfinished recording."""

    folder: Path

    @property
    def plan(self) -> Path:
        """The file that says what is being recorded."""
        return self.folder / "plan.json"

    @property
    def tree(self) -> Path:
        """The new revision folder, as it is assembled."""
        return self.folder / "tree"

    @property
    def offload(self) -> Path:
        """Where accelerate puts weights that fit no device; nothing of it is kept."""
        return self.folder.with_name(f"{self.folder.name}.offload")

    def part(self, case: str, file: str) -> Path:
        """Return a case's part of one file of the set."""
        return self.folder / "parts" / case / file

    def save_part(self, case: str, file: str, tensors: dict[str, torch.Tensor]) -> None:
        """Write a case's tensors of one file, atomically."""
        from safetensors.torch import save

        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        self.save_bytes(case, file, save(contiguous))

    def save_bytes(self, case: str, file: str, data: bytes) -> None:
        """Write a case's part as it is, atomically."""
        path = self.part(case, file)
        make_folder(path.parent)
        try:
            write_atomically(path, data)
        except OSError as error:
            raise SnapError(
                f"cannot write {path}: {error.strerror}", "make room, then go on with --resume"
            ) from error

    def forget_offload(self) -> None:
        """Remove what accelerate put on disk."""
        shutil.rmtree(self.offload, ignore_errors=True)

    def forget_parts(self) -> None:
        """Remove the answers: those of another plan, or of none, answer nothing here."""
        shutil.rmtree(self.folder / "parts", ignore_errors=True)

    def discard(self) -> None:
        """Remove everything, in one step: killed midway, a half must not look like a whole."""
        rest = self.folder.with_name(f"{self.folder.name}.discarded")
        shutil.rmtree(rest, ignore_errors=True)
        self.folder.rename(rest)
        sync_folder(self.folder.parent)
        shutil.rmtree(rest, ignore_errors=True)
