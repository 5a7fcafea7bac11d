"""Whether the installed transformers computes by everything that a config.json says."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import transformers
from packaging.version import InvalidVersion, Version

from snapshot_tool.base.errors import CheckpointUnavailable
from snapshot_tool.base.text import printable

_SHOWN = 8


def _means_nothing(value: Any) -> bool:
    """Return whether a field is off or empty."""
    return not value


def _is_full_attention(value: Any) -> bool:
    return isinstance(value, list) and all(kind == "full_attention" for kind in value)


# Fields that a newer release computes by, with that release and with the values that change
# nothing; a field counts only if the installed class does not know it. Found by comparing the
# parameters of all configuration classes of 4.51.3 with those of 4.57.6 and 5.24.0. Left out are
# fields that add weights: the weights do not fit the model then.
_NEWER: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "rope_parameters": ("5.0", _means_nothing),
    "layer_types": ("4.53", _is_full_attention),
    "use_bidirectional_attention": ("4.57", _means_nothing),
}


def unknown_fields(given: Mapping[str, Any], config: Any) -> tuple[str, ...]:
    """Return the fields of a config.json that the class of `config` does not know, sorted.

    given: what the file says. Fields of nested configurations have their place before them, as in
    text_config.pixel_shuffle_factor.
    """
    return tuple(sorted(printable(field) for field, _ in _unknown(given, config)))


def changed_fields(config: Any) -> tuple[str, ...]:
    """Return the fields that are not what their class makes of all others, sorted.

    config: a transformers configuration. Fields of nested configurations have their place before
    them. A size that follows from others, such as head_dim, is not changed.
    """
    return tuple(sorted(printable(field) for field in _changed(config)))


def _changed(config: Any, place: str = "") -> Iterator[str]:
    kind, given = type(config), config.to_dict()
    for field in sorted(set(inspect.signature(kind).parameters) & set(given)):
        value = getattr(config, field, None)
        if isinstance(value, transformers.PretrainedConfig):
            yield from _changed(value, f"{place}{field}.")
            continue
        others = {name: other for name, other in given.items() if name != field}
        try:
            default = getattr(kind(**others), field, None)
        except Exception:
            default = None
        if value != default:
            yield f"{place}{field}"


def require_computed(given: Mapping[str, Any], config: Any, path: Path) -> None:
    """Raise CheckpointUnavailable for a config.json that only a newer release computes by."""
    installed = Version(transformers.__version__)
    written = _version(given.get("transformers_version"))
    unknown = dict(_unknown(given, config))
    if written is not None and written.major > installed.major:
        lacking = f", which does not know {_listed(unknown)}" if unknown else ""
        raise CheckpointUnavailable(
            f"{path} is of transformers {written}, installed is {installed}{lacking}",
            f"record it with transformers {written} or newer",
        )
    newer = {}
    for field, value in unknown.items():
        release, changes_nothing = _NEWER.get(field.rpartition(".")[2], ("", _means_nothing))
        if release and not changes_nothing(value):
            newer[field] = Version(release)
    if newer:
        least = max(newer.values())
        needed = max(least, written) if written else least
        raise CheckpointUnavailable(
            f"{path} has {_listed(newer)}: newer releases compute by it, transformers {installed} "
            "does not know it",
            f"record it with transformers {needed} or newer",
        )


def _unknown(given: Mapping[str, Any], config: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    known = _known_fields(type(config))
    for field, value in given.items():
        nested = getattr(config, field, None)
        if isinstance(nested, transformers.PretrainedConfig) and isinstance(value, Mapping):
            yield from _unknown(value, nested, f"{place}{field}.")
        elif field not in known and not field.startswith("_"):
            yield f"{place}{field}", value


def _known_fields(kind: type) -> set[str]:
    """Return the parameters of a configuration's class and its parents, and what all have."""
    names = set(transformers.PretrainedConfig().to_dict()) | {"auto_map", "quantization_config"}
    for parent in inspect.getmro(kind):
        names |= set(inspect.signature(parent).parameters) if "__init__" in vars(parent) else set()
        names |= set(vars(parent)) | set(getattr(parent, "attribute_map", {}))
    return names


def _version(text: Any) -> Version | None:
    try:
        return Version(text) if isinstance(text, str) else None
    except InvalidVersion:
        return None


def _listed(names: Mapping[str, Any]) -> str:
    shown = sorted(map(printable, names))
    return ", ".join(shown[:_SHOWN]) + (" …" if len(shown) > _SHOWN else "")
