"""Check that a checkpoint fills an FMS model, by name and by value; FMS checks neither.

The adapter that FMS loads weights through runs here again: for the names on tensors without data
(torch's meta device), which takes no time or memory; for the values layer by layer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from snapshot_tool.base import checkpoint as checkpoint_files
from snapshot_tool.base.errors import CandidateUnavailable, CheckpointUnavailable
from snapshot_tool.base.protocol import WeightPair
from snapshot_tool.candidates.distributed import joined_ranks
from snapshot_tool.families.family import FmsPort, fields_of_shape, pairs_of, whole_numbers
from snapshot_tool.taps.hooks import plain_modules, plain_names


def require_split(model: torch.nn.Module, *, architecture: str) -> None:
    """Raise CandidateUnavailable if several ranks would each hold the whole model."""
    if joined_ranks() and not _split_modules(model):
        raise CandidateUnavailable(
            f"FMS does not split {architecture}: every rank would hold the whole model",
            "check it in one process, without torchrun",
        )


def whole_modules(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return the modules whose output is whole, by name.

    Inside a tensor-parallel module every rank has a shard of it; the module itself joins them.
    """
    inside = tuple(f"{name}." for name in _split_modules(model))
    modules = plain_modules(model)
    return {name: module for name, module in modules.items() if not name.startswith(inside)}


def _split_modules(model: torch.nn.Module) -> list[str]:
    from fms.modules.tp import TPModule

    modules = plain_modules(model)
    return [name for name, module in modules.items() if isinstance(module, TPModule)]


def takes_weight(own: Sequence[int], whole: Sequence[int]) -> bool:
    """Return, by their shapes, whether a parameter takes a weight, or this rank's shard of one."""
    ranks = joined_ranks()
    if ranks is None or len(own) != len(whole):
        return list(own) == list(whole)
    split = [(part, length) for part, length in zip(own, whole, strict=True) if part != length]
    # FMS cuts one dimension; heads fewer than ranks are on several of them.
    return len(split) <= 1 and all(part < length <= part * ranks.size for part, length in split)


# FMS's model may hold each number of a checkpoint twice (tied heads, packed weights), and tables.
_MOST_TIMES = 4
_TABLES = 2**24  # numbers
# Parts of names of fields that FMS computes tables for, and what they may be unless the
# checkpoint's own config.json says more.
_PLACES = {"position": 2**20, "image_size": 2**13}


def require_few_layers(
    config: Mapping[str, Any], weights: Mapping[str, torch.Tensor], checkpoint: Path
) -> None:
    """Raise CandidateUnavailable if a configuration has more layers than there are weights.

    The same for more positions, or larger images, than any checkpoint has by default.
    """
    own: dict[str, int] = {}
    with suppress(OSError, ValueError, RecursionError):
        own.update(whole_numbers(json.loads((checkpoint / "config.json").read_bytes())))
    for name, value in whole_numbers(config):
        field = name.rpartition(".")[2]
        most = value
        # Qwen3's max_window_layers is a bound: it may be beyond the layers that there are.
        if ("layers" in field and not field.startswith("max_")) or field == "n_layer":
            most = len(weights)
        elif any(part in field for part in _PLACES):
            usual = next(most for part, most in _PLACES.items() if part in field)
            most = max(usual, own.get(name, 0))
        if value > most:
            raise _config_misfit(f"{name} is {value}, {most} at most can be meant", checkpoint)


def require_no_more_numbers(
    model: torch.nn.Module, weights: Mapping[str, torch.Tensor], checkpoint: Path
) -> None:
    """Raise CandidateUnavailable if a model, on the meta device, is larger than its weights."""
    needed = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    there = sum(tensor.numel() for tensor in weights.values())
    if needed > _MOST_TIMES * there + _TABLES:
        raise _config_misfit(f"its model has {needed} numbers, the weights {there}", checkpoint)


def _config_misfit(why: str, checkpoint: Path) -> CandidateUnavailable:
    return CandidateUnavailable(
        f"the recorded configuration is not that of {checkpoint}: {why}",
        "record the checkpoint again, or get the golden set from where it was recorded",
    )


_SHOWN = 3
_SIZES = (
    "FMS computes this size from other fields, or the family's declaration maps it wrongly: "
    "see docs/adding-a-family.md"
)
# What fms.utils.fusion may have split after loading.
_FUSED: Mapping[str, tuple[str, ...]] = {
    "in_proj.qkv_fused": ("in_proj.query", "in_proj.key", "in_proj.value"),
    "wg1_fused": ("wg", "w1"),
}


def require_coverage(
    model: torch.nn.Module,
    weights: Mapping[str, torch.Tensor],
    checkpoint: Path,
    port: FmsPort,
    config: Mapping[str, Any],
) -> tuple[str, ...]:
    """Fill the model's weights that a checkpoint leaves unset with NaN; return their names.

    If one of them matters, NaN reaches a tensor that is compared. FMS itself leaves what its memory
    held. A head that shares its memory with the embedding is set. What the model computes itself,
    such as position ids, is a buffer and not counted.

    weights: the checkpoint's, by name, without data; see read_shapes.
    Raises CandidateUnavailable if a weight of the checkpoint fits none of the model, and for an
    unset one that cannot hold NaN.
    """
    adapted = require_shapes(model, weights, checkpoint, port, config)
    own = plain_names(model.state_dict(keep_vars=True).items())
    filled = {own[name].data_ptr() for name in own.keys() & adapted.keys()}
    unset = {n for n in own.keys() - adapted.keys() if own[n].data_ptr() not in filled}
    named = plain_names(model.named_parameters())
    parameters = {name: weight for name, weight in named.items() if name in unset}
    missing = {name for name, weight in parameters.items() if not weight.is_floating_point()}
    unused = adapted.keys() - own.keys()
    problems = []
    if missing:
        problems.append(f"leaves {len(missing)} weights of FMS's model unset: {_listed(missing)}")
    if unused:
        problems.append(f"has {len(unused)} weights that nothing takes: {_listed(unused)}")
    if problems:
        raise CandidateUnavailable(
            f"{checkpoint} {'; it '.join(problems)}",
            "compare the checkpoint's names with FMS's adapter for it",
        )
    with torch.no_grad():
        for weight in parameters.values():
            weight.fill_(torch.nan)
    return tuple(parameters)


def require_shapes(
    model: torch.nn.Module,
    weights: Mapping[str, torch.Tensor],
    checkpoint: Path,
    port: FmsPort,
    config: Mapping[str, Any],
) -> dict[str, torch.Tensor]:
    """Return the weights of a checkpoint by FMS's names, and as FMS lays them out.

    The model may be on the meta device.
    Raises CandidateUnavailable if a weight has another shape than the model's. The error names the
    first one, both shapes, and the fields of the configuration that give the checkpoint's.
    """
    own = plain_names(model.state_dict().items())
    try:
        adapted = _adapted(model, weights, port)
    except RuntimeError as error:
        key = _misfit(model, weights, port)
        shape = weights[key].shape if key in weights else ()
        fields = fields_of_shape(config, shape[:1], (0,))
        raise CandidateUnavailable(
            f"FMS cannot lay out {key} {tuple(shape)} of {checkpoint}: {error}"
            f"{f'; config.json has {fields}' if fields else ''}",
            _SIZES,
        ) from error
    for name, weight in adapted.items():
        if name not in own or takes_weight(own[name].shape, weight.shape):
            continue
        fields = fields_of_shape(config, weight.shape, own[name].shape)
        raise CandidateUnavailable(
            f"{name} is {tuple(weight.shape)} in {checkpoint}, {tuple(own[name].shape)} in FMS's "
            f"model{f'; config.json has {fields}' if fields else ''}",
            _SIZES,
        )
    return adapted


def _misfit(model: torch.nn.Module, weights: Mapping[str, torch.Tensor], port: FmsPort) -> str:
    """Return the first key that FMS's adapter cannot take by its shape, or ""."""
    for key, weight in weights.items():
        try:
            _adapted(model, {key: weight}, port)
        except RuntimeError:
            return key
        except Exception:  # noqa: S112 - an adapter may need the keys beside it
            continue
    return ""


def pair_weights(
    model: torch.nn.Module,
    checkpoint: Path,
    port: FmsPort,
    config: Mapping[str, Any],
    *,
    unused: frozenset[str] = frozenset(),
) -> Iterator[WeightPair]:
    """Yield the checkpoint's weights, adapted as on loading, beside the model's, by layers.

    unused: keys of the checkpoint that take part in no answer of the reference.
    """
    own = plain_names(model.state_dict().items())
    with _opened(checkpoint) as files:
        names = [name for name in files if port.is_weight(name, config) and name not in unused]
    for keys in _layers(names):
        # Opened again: what was read of mapped files stays in memory until they are closed.
        with _opened(checkpoint) as files:
            layer = {key: files[key].get_tensor(key) for key in keys}
            for name, expected in _adapted(model, layer, port).items():
                actual = _own_weight(own, name)
                yield WeightPair(name, expected, actual, partial(_reference_modules, name, port))


def find_doubles(
    model: torch.nn.Module, weights: Mapping[str, torch.Tensor], port: FmsPort
) -> dict[str, list[str]]:
    """Return the keys of a checkpoint that FMS adapts to one weight, by its name in the model.

    weights: the checkpoint's, by name, without data. Keys that FMS joins to one weight, such as
    query, key and value, have other shapes than it and are not counted.
    """
    found: dict[str, list[str]] = {}
    own = plain_names(model.state_dict().items())
    for key, weight in weights.items():
        with suppress(Exception):  # an adapter may need the keys beside it
            for name, adapted in _adapted(model, {key: weight}, port).items():
                if name in own and own[name].shape == adapted.shape:
                    found.setdefault(name, []).append(key)
    return {name: sorted(keys) for name, keys in found.items() if len(keys) > 1}


def _adapted(
    model: torch.nn.Module, weights: Mapping[str, torch.Tensor], port: FmsPort
) -> dict[str, torch.Tensor]:
    """Return weights of the checkpoint by FMS's names, and as FMS lays them out."""
    from fms.utils import serialization

    known = {"model_config": getattr(model, "config", None)}
    return dict(serialization.get_adapted(port.architecture, "hf", weights, known))


def _own_weight(own: Mapping[str, torch.Tensor], name: str) -> torch.Tensor | None:
    """Return the model's weight of a name; if it was split, its parts joined."""
    if name in own:
        return own[name]
    for fused, parts in _FUSED.items():
        pieces = [own.get(name.replace(fused, part)) for part in parts if fused in name]
        whole = [piece for piece in pieces if piece is not None]
        if whole and len(whole) == len(pieces):
            return torch.cat(whole)
    return None


def _reference_modules(weight: str, port: FmsPort) -> tuple[str, ...]:
    """Return Hugging Face's modules that a weight belongs to."""
    module = weight.rpartition(".")[0]
    # What FMS fuses may correspond to the module around it.
    around = module.rpartition(".")[0]
    pairs = pairs_of(module, port.module_pairs) or pairs_of(around, port.module_pairs)
    return tuple(hf_name for hf_name, _ in pairs)


def read_shapes(
    checkpoint: Path, port: FmsPort, config: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """Return every weight that the reference loads as a tensor of its shape without data."""
    with _opened(checkpoint) as files:
        names = [name for name in files if port.is_weight(name, config)]
        return {name: files[name].get_tensor(name).to("meta") for name in names}


def _listed(names: set[str]) -> str:
    shown = sorted(names)[:_SHOWN]
    return ", ".join(shown) + (" …" if len(names) > _SHOWN else "")


def _layers(names: Iterable[str]) -> list[list[str]]:
    """Return names in groups that FMS's adapters can fuse: each layer, and the rest."""
    groups: dict[str, list[str]] = {}
    for name in names:
        numbered = re.match(r".*?\.\d+\.", name)
        groups.setdefault(numbered[0] if numbered else "", []).append(name)
    return list(groups.values())


def weight_files(checkpoint: Path) -> list[Path]:
    """Return the files that hold a checkpoint's weights, as transformers chooses them.

    Other files may be left over from an older save. If there are none, return all of the folder's;
    raise CheckpointUnavailable if it has none at all.
    """
    if names := checkpoint_files.weight_files(checkpoint):
        return [checkpoint / name for name in names if name != checkpoint_files.INDEX]
    if found := _all_files(checkpoint):
        return found
    raise CheckpointUnavailable(
        f"{checkpoint} has no safetensors weights",
        "it needs model.safetensors, or model.safetensors.index.json with the files that it names",
    )


def stray_files(checkpoint: Path) -> list[str]:
    """Return the names of weight files that FMS reads and that are not the checkpoint's."""
    own = weight_files(checkpoint)
    return [path.name for path in _all_files(checkpoint) if path not in own]


def _all_files(checkpoint: Path) -> list[Path]:
    # FMS passes over Mistral's own layout of the same weights.
    found = checkpoint.glob("*.safetensors")
    return sorted(path for path in found if path.name != "consolidated.safetensors")


@contextmanager
def _opened(checkpoint: Path) -> Iterator[Mapping[str, Any]]:
    """Open a checkpoint's files of weights; yield the file of each weight, by the weight's name.

    A weight's memory is the file's until something is computed with it.
    Raises CheckpointUnavailable if a file cannot be read.
    """
    paths = weight_files(checkpoint)
    holders: dict[str, Any] = {}
    with ExitStack() as stack:
        for path in paths:
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise CheckpointUnavailable(f"{path} cannot be read: {error}") from error
            holders.update(dict.fromkeys(file.keys(), file))
        yield holders
