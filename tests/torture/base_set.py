"""A small whole golden set, with the checkpoint that it names: what the mutations begin from."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from tests.unit.factory import make_manifest, write_files, write_manifest

CHECKPOINT_TEXT = b'{"model_type": "idefics3"}'
GOLDENS = "goldens"
REVISION = "0123456789abcdef" * 4


def write_base(root: Path) -> Path:
    """Write goldens/ and checkpoint/ below `root` and return the set's folder."""
    (root / "checkpoint").mkdir(parents=True)
    (root / "checkpoint" / "config.json").write_bytes(CHECKPOINT_TEXT)
    folder = root / GOLDENS / "local--tiny" / REVISION[:12] / "cpu-float32"
    folder.mkdir(parents=True)
    manifest = make_manifest(write_files(folder))
    entry = msgspec.structs.replace(
        manifest.checkpoint,
        family="idefics3",
        location="checkpoint",
        files={"config.json": hashlib.sha256(CHECKPOINT_TEXT).hexdigest()},
        config={"model_type": "idefics3", "text_config": {"vocab_size": 12}},
    )
    write_manifest(folder, msgspec.structs.replace(manifest, checkpoint=entry))
    return folder
