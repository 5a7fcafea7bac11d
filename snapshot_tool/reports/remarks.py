"""What a user of a golden set should know about the reference that answered."""

from __future__ import annotations

from collections.abc import Sequence

from snapshot_tool.goldens.manifest import ManifestHead

_SHOWN = 3


def remarks(manifest: ManifestHead) -> list[str]:
    """Return a line for each thing, in the order of their weight."""
    lines = [
        f"case {case.name} has NaN or Inf in: {', '.join(case.not_finite)}"
        for case in manifest.cases
        if case.not_finite
    ]
    lines += manifest.reference_warnings
    unused = manifest.checkpoint.unused_weights
    if unused:
        lines.append(
            f"{len(unused)} weights of the checkpoint take part in no answer: {_few(unused)}"
        )
    return lines


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (" …" if len(names) > _SHOWN else "")
