"""The folders and files of golden sets.

goldens/<owner>--<name>/<revision, first 12>/
    inputs.safetensors          shared by all devices of the revision
    <device>-<dtype>/           manifest.json and one safetensors file for each phase
goldens/.snap/                  locks and unfinished recordings; never read as a golden
"""

import re
from dataclasses import dataclass
from pathlib import Path

from snapshot_tool.base.protocol import Phase

SHORT_REVISION = 12
MANIFEST = "manifest.json"
INPUTS = "inputs.safetensors"
TAPS = "taps.safetensors"
ORACLE = "oracle.safetensors"
OUTPUTS = "outputs.safetensors"
MODULE_INPUTS = "module_inputs.safetensors"
PROBES = "probes.safetensors"
PNG = ".png"  # ends the name of a tensor that is the bytes of a picture
WORK_FOLDER = ".snap"

_DEVICES = ("cpu", "cuda")
_SET_NAME = re.compile(rf"({'|'.join(_DEVICES)})-(float32|float64|bfloat16|float16)")


def phase_file(phase: Phase) -> str:
    """Return the name of a phase's file inside a set's folder."""
    return f"{phase.value}.safetensors"


def work_folder(revision_folder: Path) -> Path:
    """Return where recordings of a revision are locked and staged."""
    root = revision_folder.parent.parent
    return root / WORK_FOLDER / revision_folder.parent.name / revision_folder.name


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
    def set_name(self) -> str:
        """The device and dtype as one folder: "cpu-float32"."""
        return f"{self.device}-{self.dtype}"

    @property
    def revision_folder(self) -> Path:
        """The folder of all sets of the revision."""
        checkpoint = self.checkpoint.replace("/", "--")
        return self.root / checkpoint / self.revision[:SHORT_REVISION]

    @property
    def folder(self) -> Path:
        """The set's own folder."""
        return self.revision_folder / self.set_name

    @property
    def work_folder(self) -> Path:
        """Where recordings of the revision are locked and staged."""
        return work_folder(self.revision_folder)

    def __str__(self) -> str:
        """Return the set's name for messages."""
        return f"{self.checkpoint} at {self.revision[:SHORT_REVISION]} ({self.set_name})"


def revision_folders(root: Path) -> list[Path]:
    """Return the folders of all revisions below a goldens folder, sorted by name."""
    return [revision for checkpoint in _folders(root) for revision in _folders(checkpoint)]


def set_folders(revision: Path) -> list[Path]:
    """Return the folders in a revision's folder that look like golden sets, sorted by name."""
    return [folder for folder in _folders(revision) if _SET_NAME.fullmatch(folder.name)]


def _folders(parent: Path) -> list[Path]:
    """Return the visible folders in a folder, sorted by name; none if it is missing."""
    if not parent.is_dir():
        return []
    return sorted(c for c in parent.iterdir() if not c.name.startswith(".") and c.is_dir())
