"""Copies of the committed checkpoints, to be spoilt, and what a recording made of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from snapshot_tool.base.protocol import Progress
from snapshot_tool.goldens.golden import Golden, open_golden
from snapshot_tool.goldens.manifest import Manifest
from snapshot_tool.record.request import RecordRequest
from snapshot_tool.record.workflow import record
from tests.conftest import CHECKPOINT, ROOT, set_folder
from tests.families.record import builder

LLAMA = ROOT / "tests" / "families" / "checkpoints" / "llama"
ROBERTA = ROOT / "tests" / "families" / "checkpoints" / "roberta"
IDEFICS3 = CHECKPOINT
SMALL = ("--variants", "2", "--max-new-tokens", "4")


class Notes(Progress):
    """Keeps what `snap record` would print as it goes."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, message: str) -> None:
        self.lines.append(message)


def record_here(
    checkpoint: Path,
    goldens: Path,
    *,
    prompts: Sequence[str] = (),
    notes: Notes | None = None,
    **options: Any,
) -> Manifest:
    """Record in this process, two variants and four tokens by default; return the manifest.

    An error that is not a SnapError would be reported as a fault of snap.
    """
    if prompts:
        file = goldens.with_name("prompts.json")
        file.write_text(json.dumps(prompts), encoding="utf-8")
        options["prompt"] = [file]
    request = RecordRequest(
        str(checkpoint), goldens, **{"variants": 2, "max_new_tokens": 4, **options}
    )
    return record(request, notes or Notes(), lambda _diff: "because").manifest


def open_set(goldens: Path) -> Golden:
    """Open the one golden set."""
    return open_golden(set_folder(goldens))


def manifest_of(goldens: Path) -> Any:
    """Return the manifest of the one set."""
    return json.loads((set_folder(goldens) / "manifest.json").read_text(encoding="utf-8"))


def copy_checkpoint(source: Path, folder: Path) -> Path:
    """Copy a checkpoint's folder."""
    return Path(shutil.copytree(source, folder))


def build_checkpoint(name: str, folder: Path, **fields: Any) -> Path:
    """Build a tiny checkpoint of a family, with other fields in its config.json."""
    builder().build_all(folder, [name])
    edit_json(folder / name / "config.json", **fields)
    return folder / name


def edit_json(path: Path, **fields: Any) -> None:
    """Change fields of a JSON file; None removes one."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    content |= fields
    kept = {name: value for name, value in content.items() if value is not None}
    path.write_text(json.dumps(kept), encoding="utf-8")


def edit_weights(folder: Path, **changes: Any) -> None:
    """Replace weights of a checkpoint, or add them; None removes one."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    weights = {**load_file(path), **changes}
    kept = {name: weight for name, weight in weights.items() if weight is not None}
    save_file(kept, path, metadata={"format": "pt"})
