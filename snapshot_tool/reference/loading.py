"""Loading a checkpoint with transformers: configuration, weights, float64."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import InvalidVersion, Version
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode

from snapshot_tool.base.checkpoint import weight_files
from snapshot_tool.base.errors import CheckpointUnavailable, printable


class _Float64Throughout(TorchDispatchMode):  # type: ignore[no-untyped-call] # untyped in torch
    """Puts float64 in float32's place in every operation."""

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run one operation with float64 in float32's place."""
        wide = {name: _widen(value) for name, value in (kwargs or {}).items()}
        return func(*map(_widen, args), **wide)


def float64_throughout() -> AbstractContextManager[Any]:
    """Return a context in which whatever asks torch for float32 gets float64."""
    context: AbstractContextManager[Any] = _Float64Throughout()  # type: ignore[no-untyped-call]
    return context


def _widen(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def widen_rotary_frequencies(model: torch.nn.Module) -> None:
    """Compute rotary frequencies anew: they are float32 buffers whatever a model loads in."""
    for module in model.modules():
        initialise = getattr(module, "rope_init_fn", None)
        if callable(initialise) and isinstance(getattr(module, "inv_freq", None), torch.Tensor):
            with float64_throughout():
                module.inv_freq, _ = initialise(module.config, module.inv_freq.device)


# Some files hold these, which models compute.
_BUFFERS = ("inv_freq", "masked_bias", "position_ids")
_PROBLEMS = {
    "missing_keys": "does not have",
    "mismatched_keys": "has with another shape than its configuration",
}


def require_filled(model: torch.nn.Module, report: Mapping[str, Any], checkpoint: Path) -> None:
    """Raise CheckpointUnavailable if the model would compute with weights that are not its own.

    That is with one that the files lack or have in another shape, and without one that they have
    for a module of the model, as a bias or a layer that the configuration does not have. Weights of
    other modules, as heads of other classes, take part in no answer.
    """
    for kind, problem in _PROBLEMS.items():
        if report.get(kind):
            raise _misfit(checkpoint, problem, [str(key) for key in report[kind]], kind)
    modules = dict(model.named_modules())
    kept_from = [key for key in report.get("unexpected_keys", ()) if _belongs(key, modules)]
    if kept_from:
        problem = "has for a part of the model that does not take it"
        raise _misfit(checkpoint, problem, kept_from, "unexpected_keys")


def _misfit(checkpoint: Path, problem: str, names: list[str], kind: str) -> CheckpointUnavailable:
    return CheckpointUnavailable(
        f"{checkpoint} {problem}: {min(names)}, first of {len(names)} {kind.replace('_', ' ')}",
        "see that config.json and the weights are of the same model",
    )


def _belongs(weight: str, modules: Mapping[str, torch.nn.Module]) -> bool:
    """Tell whether a weight is for a module of the model, or for a further one of its layers."""
    owner, _, own_name = weight.rpartition(".")
    if own_name in _BUFFERS or not owner:
        return False
    if owner in modules:
        return True
    while owner and owner not in modules:
        owner = owner.rpartition(".")[0]
    return isinstance(modules[owner], torch.nn.ModuleList)


def unused_weights(
    model: torch.nn.Module, report: Mapping[str, Any], checkpoint: Path
) -> tuple[str, ...]:
    """Return the names of the weights in the files that take part in no answer, sorted.

    These are weights that the model does not have, and those that are tied to another weight of
    the files and differ from it, as an output head beside a tied embedding.
    """
    left = set(map(str, report.get("unexpected_keys", ())))
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    own = dict(model.state_dict(keep_vars=True))
    names = set()
    for name, weight in _stored(checkpoint, _tied(own)):
        # transformers names weights as the model does, with or without the base model's prefix.
        is_left = bool(left & {name, f"{prefix}{name}", name.removeprefix(prefix)})
        if is_left or (weight is not None and not _is_same(weight, own[name])):
            names.add(name)
    return tuple(sorted(map(printable, names)))


def _tied(own: Mapping[str, torch.Tensor]) -> set[str]:
    """Return the names of weights that share their memory with another one."""
    by_place: dict[int, list[str]] = {}
    for name, weight in own.items():
        if weight.device.type != "meta" and weight.numel():
            by_place.setdefault(weight.data_ptr(), []).append(name)
    return {name for names in by_place.values() if len(names) > 1 for name in names}


def _stored(checkpoint: Path, wanted: set[str]) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Yield the name of every weight in the files, with its values if they are wanted."""
    for file in weight_files(checkpoint):
        if file.endswith(".safetensors"):
            with safe_open(checkpoint / file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is no mapping
                    yield name, opened.get_tensor(name) if name in wanted else None


def _is_same(stored: torch.Tensor, used: torch.Tensor) -> bool:
    return stored.shape == used.shape and torch.equal(stored.to(used.dtype), used.detach().cpu())


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
