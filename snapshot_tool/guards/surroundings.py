"""Where this machine is not the one that recorded a golden set: no fault, but worth knowing."""

from collections.abc import Mapping

# What rounds differently; versions of tools that compute nothing are left out.
_MATTERS = ("processor", "torch", "torch_threads", "pillow", "numpy")


def differing_surroundings(recorded: Mapping[str, str], here: Mapping[str, str]) -> tuple[str, ...]:
    """Return "name was, is" for everything that may round otherwise than when recording."""
    return tuple(
        f"{name} {recorded[name]}, here {here[name]}"
        for name in _MATTERS
        if name in recorded and name in here and recorded[name] != here[name]
    )
