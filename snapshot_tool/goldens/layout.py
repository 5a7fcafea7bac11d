"""Where everything of a golden set lies.

goldens/<owner>--<name>/<revision, first 12>/
    inputs.safetensors          shared by all devices of the revision
    <device>-<dtype>/           manifest.json and one safetensors file for each phase
goldens/.snap/                  locks and unfinished recordings; never read as a golden
"""

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from snapshot_tool.base.phases import Phase

SHORT_REVISION = 12
MANIFEST = "manifest.json"
INPUTS = "inputs.safetensors"
TAPS = "taps.safetensors"
ORACLE = "oracle.safetensors"
OUTPUTS = "outputs.safetensors"
WORK_FOLDER = ".snap"

_DEVICES = ("cpu", "cuda")
_SET_NAME = re.compile(rf"({'|'.join(_DEVICES)})-(float32|float64|bfloat16|float16)")


def phase_file(phase: Phase) -> str:
    """Return the name of a phase's file inside a set's folder."""
    return f"{phase.value}.safetensors"


@dataclass(frozen=True, slots=True)
class SetLocation:
    """The place of one golden set.

    Args:
        root: the goldens folder.
        checkpoint: "owner/name".
        revision: the full revision; its first 12 digits name the folder.
        device: "cpu" or "cuda".
        dtype: a torch dtype's name.
    """

    root: Path
    checkpoint: str
    revision: str
    device: str
    dtype: str

    @property
    def checkpoint_folder(self) -> str:
        """The checkpoint's name as one folder: "owner--name"."""
        return self.checkpoint.replace("/", "--")

    @property
    def set_name(self) -> str:
        """The device and dtype as one folder: "cpu-float32"."""
        return f"{self.device}-{self.dtype}"

    @property
    def revision_folder(self) -> Path:
        """The folder of all sets of the revision."""
        return self.root / self.checkpoint_folder / self.revision[:SHORT_REVISION]

    @property
    def folder(self) -> Path:
        """The set's own folder."""
        return self.revision_folder / self.set_name

    @property
    def work_folder(self) -> Path:
        """Where recordings of the revision are locked and staged."""
        return self.root / WORK_FOLDER / self.checkpoint_folder / self.revision[:SHORT_REVISION]

    def __str__(self) -> str:
        """Name the set as people read it."""
        return f"{self.checkpoint} at {self.revision[:SHORT_REVISION]} ({self.set_name})"


def find_set_folders(root: Path) -> list[Path]:
    """Return the folders under `root` that look like golden sets, sorted by name."""
    return [
        Path(entry.path)
        for checkpoint in _folders(root)
        for revision in _folders(checkpoint)
        for entry in _folders(revision)
        if _SET_NAME.fullmatch(entry.name)
    ]


def folder_identities(root: Path) -> dict[str, int]:
    """Return the number by which the system knows each revision's folder: another one is new."""
    identities = {}
    for revision in (r for checkpoint in _folders(root) for r in _folders(checkpoint)):
        with contextlib.suppress(FileNotFoundError):
            identities[revision.path] = Path(revision).stat().st_ino
    return identities


def _folders(parent: os.PathLike[str]) -> list[os.DirEntry[str]]:
    """Return the folders in a folder, by name. Of a thousand sets each question counts."""
    try:
        with os.scandir(parent) as children:
            found = [child for child in children if not child.name.startswith(".")]
    except (FileNotFoundError, NotADirectoryError):  # taken away meanwhile, or never there
        return []
    return sorted(filter(_is_folder, found), key=lambda child: child.name)


def _is_folder(child: os.DirEntry[str]) -> bool:
    # Of a link Path knows more: it may go round in a circle.
    return child.is_dir(follow_symlinks=False) or (child.is_symlink() and Path(child).is_dir())
