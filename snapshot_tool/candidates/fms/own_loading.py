"""Loading a checkpoint as FMS's users do, by get_model("hf_pretrained"): `--loading own`.

FMS itself maps Hugging Face's configuration to its own fields there, and imports transformers for
it. Each field is compared with snap's mapping.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from snapshot_tool.base.errors import CandidateUnavailable
from snapshot_tool.base.places import describe_error
from snapshot_tool.base.protocol import CandidateRequest, FieldDifference
from snapshot_tool.families.family import Family, FmsPort, computed_without

# Fields without an effect on numbers if the weights fit: widths are rounded up to multiple_of,
# tables of positions may be longer or shorter, the padding token's row comes from the checkpoint.
_HARMLESS = {"multiple_of", "max_expected_seq_len", "max_pos", "pad_id", "p_dropout"}

Fields = Mapping[str, Any]


def load_by_fms(
    family: Family, request: CandidateRequest
) -> tuple[torch.nn.Module, tuple[FieldDifference, ...]]:
    """Return the model that FMS loads, and the fields that its mapping fills differently.

    Raises CandidateUnavailable without transformers, and if FMS cannot load the checkpoint: with
    the differences, since they may be the cause.
    """
    from fms import models

    differences = _compare_mappings(family, request)
    try:
        model = models.get_model(
            "hf_pretrained",
            variant=str(request.checkpoint),
            device_type=request.device,
            data_type=getattr(torch, request.dtype),
        )
    except Exception as error:
        why = "".join(f"; {difference}" for difference in differences)
        raise CandidateUnavailable(
            f"FMS's own loading of {request.checkpoint} raises {describe_error(error)}{why}",
            "repair FMS's mapping, or leave out --loading own",
        ) from error
    return model, differences


def _compare_mappings(family: Family, request: CandidateRequest) -> tuple[FieldDifference, ...]:
    """Return the fields that FMS's own mapping fills differently from snap's."""
    from fms import models

    try:
        from fms.models.hf.utils import infer_model_configuration
    except ImportError as error:
        raise CandidateUnavailable(
            f"--loading own needs transformers, which FMS imports for it: {error}",
            "check in an environment that has it, or leave out --loading own",
        ) from error
    try:
        own = dict(infer_model_configuration(str(request.checkpoint), download_weights=False))
    except Exception as error:
        raise CandidateUnavailable(
            f"FMS's own mapping of {request.checkpoint} raises {describe_error(error)}",
            "repair FMS's mapping, or leave out --loading own",
        ) from error
    architecture, variant = own.pop("architecture"), own.pop("variant")
    if architecture != family.fms.architecture:
        raise CandidateUnavailable(
            f"FMS's own loading takes the checkpoint for {architecture}, not "
            f"{family.fms.architecture}",
            "leave out --loading own",
        )
    own.pop("model_path", None)
    try:
        # As get_model begins; FMS 1.13.1 has no public name for it.
        model = models._get_model_instance(  # noqa: SLF001
            architecture, variant, device=torch.device("meta"), extra_args=own
        )
        config: Any = model.config
    except Exception:  # a mapping without sense: its fields are compared as they are
        config = own
    return tuple(_differences(family.fms, request.config, config))


def _differences(port: FmsPort, hf_config: Fields, own: Any) -> Iterator[FieldDifference]:
    """Yield the fields of `own`, FMS's configuration, that snap's mapping fills differently."""
    for name, value, beside in _leaves(port.config(hf_config)):
        last = name.rpartition(".")[2]
        actual = _field(own, name, otherwise=computed_without(port.absent, last, beside))
        if not _alike(actual, value):
            sources = tuple(_sources(port.config, hf_config, name))
            harmless = last in _HARMLESS
            yield FieldDifference(name, str(actual), str(value), sources, harmless=harmless)


def _leaves(fields: Fields, path: str = "") -> Iterator[tuple[str, Any, Fields]]:
    """Yield the dotted name of each field, its value and the fields beside it."""
    for name, value in fields.items():
        if isinstance(value, Mapping) and name.endswith("_config"):
            yield from _leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value, fields


def _field(config: Any, name: str, *, otherwise: Any = None) -> Any:
    """Return a field of a configuration, an object or a mapping; `otherwise` if it has none."""
    *outer, last = name.split(".")
    for part in outer:
        config = config.get(part) if isinstance(config, Mapping) else getattr(config, part, None)
    fields = config if isinstance(config, Mapping) else vars(config)
    return fields.get(last, otherwise)


def _alike(actual: Any, expected: Any) -> bool:
    """Return whether two values mean the same to FMS: it has several names for an activation."""
    if isinstance(actual, str) and isinstance(expected, str):
        return actual == expected or _activation(actual) == _activation(expected) is not None
    off = all(value is None or value is False or value == {} for value in (actual, expected))
    return bool(actual == expected) or off


def _activation(name: str) -> type | None:
    from fms.utils.activation import str_to_activation

    try:
        return type(str_to_activation(name))
    except (KeyError, ValueError):
        return None


def _sources(mapping: Callable[[Fields], Fields], config: Fields, name: str) -> Iterator[str]:
    """Yield the fields of Hugging Face's configuration that change a field of FMS's."""
    own = _field(mapping(config), name)
    for source in _paths(config):
        try:
            changed = _field(mapping(_changed(config, source)), name)
        except Exception:  # noqa: S112 - a value without sense, which says nothing
            continue
        if changed != own:
            yield ".".join(source)


def _paths(config: Fields, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _paths(value, (*path, name))
        elif isinstance(value, int | float | str | list):
            yield (*path, name)


def _changed(config: Fields, path: tuple[str, ...]) -> dict[str, Any]:
    """Return a configuration with another value in one place."""
    name, *rest = path
    value = config[name]
    if rest:
        return {**config, name: _changed(value, tuple(rest))}
    if isinstance(value, bool):
        return {**config, name: not value}
    if isinstance(value, list):
        return {**config, name: value * 2}
    return {**config, name: f"{value}'" if isinstance(value, str) else value * 2 + 1}
