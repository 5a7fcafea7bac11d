"""Where this machine is not the one that recorded a golden set: no fault, but worth knowing."""

import re
from collections.abc import Mapping

from snapshot_tool.families.family import FILE

# What rounds differently; versions of tools that compute nothing are left out.
_MATTERS = ("processor", "torch", "torch_threads", "pillow", "numpy", FILE)


def environment_differences(
    recorded: Mapping[str, str], here: Mapping[str, str]
) -> tuple[str, ...]:
    """Return "name was, is" for everything that may round otherwise than when recording."""
    return tuple(
        f"{name} {_short(recorded[name])}, here {_short(here[name])}"
        for name in _MATTERS
        if name in recorded and name in here and recorded[name] != here[name]
    )


def _short(value: str) -> str:
    """Return the first digits of a digest; everything else as it is."""
    return value[:12] if re.fullmatch(r"[0-9a-f]{64}", value) else value
