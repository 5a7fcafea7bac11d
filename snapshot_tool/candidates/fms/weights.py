"""Check that a checkpoint fills an FMS model, by name and by value; FMS checks neither.

The adapter that FMS loads weights through runs here again: for the names on tensors without data
(torch's meta device), which takes no time or memory; for the values layer by layer.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from snapshot_tool.base import checkpoint as checkpoint_files
from snapshot_tool.base.errors import CandidateUnavailable, CheckpointUnavailable
from snapshot_tool.base.protocol import CandidateRequest, WeightPair
from snapshot_tool.candidates.fms.configuration import fields_of_shape, whole_numbers
from snapshot_tool.candidates.fms.shards import Shards
from snapshot_tool.families.family import FmsPort, pairs_of
from snapshot_tool.taps.hooks import plain_names

# FMS's model may hold each number of a checkpoint twice (tied heads, packed weights), and tables.
_MOST_TIMES = 4
_TABLES = 2**24  # numbers
# Parts of names of fields that FMS computes tables for, and their greatest values, unless the
# checkpoint's own config.json has greater ones.
_PLACES = {"position": 2**20, "image_size": 2**13}
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


class CheckpointWeights:
    """A checkpoint's weights, by name, and as FMS's adapter maps them to its model's.

    every: those that the reference loads, as tensors of their shape without data.
    used: those of them that take part in an output of the reference.
    Methods raise CandidateUnavailable, and CheckpointUnavailable if a file cannot be read.
    """

    def __init__(self, request: CandidateRequest, port: FmsPort) -> None:
        self._checkpoint, self._config, self._port = request.checkpoint, request.config, port
        with _open_weights(self._checkpoint) as files:
            names = [name for name in files if port.is_weight(name, self._config)]
            self.every = {name: files[name].get_tensor(name).to("meta") for name in names}
        unused = request.unused_weights
        self.used = {name: shape for name, shape in self.every.items() if name not in unused}

    def require_few_layers(self) -> None:
        """Raise if the recorded configuration has more layers than there are weights.

        Also raise for more positions, or larger images, than `_PLACES` and config.json allow.
        """
        own: dict[str, int] = {}
        with suppress(OSError, ValueError, RecursionError):
            own.update(whole_numbers(json.loads((self._checkpoint / "config.json").read_bytes())))
        for name, value in whole_numbers(self._config):
            field, most = name.rpartition(".")[2], value
            # Qwen3's max_window_layers is a bound: it may be beyond the layers that there are.
            if ("layers" in field and not field.startswith("max_")) or field == "n_layer":
                most = len(self.used)
            for part, usual in _PLACES.items():
                if part in field:
                    most = max(usual, own.get(name, 0))
            if value > most:
                self._raise_misfit(f"{name} is {value}, at most {most} is possible")

    def require_no_more_numbers(self, model: torch.nn.Module) -> None:
        """Raise if a model, on the meta device, is larger than its weights."""
        needed = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
        there = sum(tensor.numel() for tensor in self.used.values())
        if needed > _MOST_TIMES * there + _TABLES:
            self._raise_misfit(f"its model has {needed} numbers, the weights {there}")

    def _raise_misfit(self, why: str) -> None:
        raise CandidateUnavailable(
            f"the recorded configuration is not that of {self._checkpoint}: {why}",
            "record the checkpoint again, or get the golden set from where it was recorded",
        )

    def adapt(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Return the used weights by FMS's names, and as FMS lays them out.

        The model may be on the meta device. Raises if a weight has another shape than the model's:
        the error names the first one, both shapes, and the fields of the configuration that give
        the checkpoint's.
        """
        try:
            adapted = self._adapt(model, self.used)
        except RuntimeError as error:
            key = self._find_misfit(model)
            shape = tuple(self.used[key].shape) if key else ()
            raise CandidateUnavailable(
                f"FMS cannot lay out {key} {shape} of {self._checkpoint}: {error}"
                f"{fields_of_shape(self._config, shape[:1], (0,))}",
                _SIZES,
            ) from error
        own, shards = plain_names(model.state_dict().items()), Shards(model)
        for name, weight in adapted.items():
            if name in own and own[name].shape != shards.of(name, weight, own[name]).shape:
                fields = fields_of_shape(self._config, weight.shape, own[name].shape)
                raise CandidateUnavailable(
                    f"{name} is {tuple(weight.shape)} in {self._checkpoint}, "
                    f"{tuple(own[name].shape)} in FMS's model{fields}",
                    _SIZES,
                )
        return adapted

    def _adapt(
        self, model: torch.nn.Module, weights: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        from fms.utils import serialization

        given = (
            *(self._port.architecture, "hf", weights),
            {"model_config": getattr(model, "config", None)},
        )
        # FMS before 0.0.7 hands its adapters the weights alone.
        accepted = len(inspect.signature(serialization.get_adapted).parameters)
        return dict(serialization.get_adapted(*given[:accepted]))

    def _find_misfit(self, model: torch.nn.Module) -> str:
        """Return the first key that FMS's adapter cannot take by its shape, or ""."""
        for key, weight in self.used.items():
            try:
                self._adapt(model, {key: weight})
            except RuntimeError:
                return key
            except Exception:  # noqa: S112 - an adapter may need the keys beside it
                continue
        return ""

    def fill_unset(self, model: torch.nn.Module) -> tuple[str, ...]:
        """Fill the model's weights that the checkpoint leaves unset with NaN; return their names.

        If one of them matters, NaN reaches a tensor that is compared. FMS itself leaves what its
        memory held. A head that shares its memory with the embedding is set. What the model
        computes itself, such as position ids, is a buffer and not counted.

        Raises if a weight of the checkpoint fits none of the model, and for an unset one that
        cannot hold NaN.
        """
        adapted = self.adapt(model)
        own = plain_names(model.state_dict(keep_vars=True).items())
        filled = {own[name].data_ptr() for name in own.keys() & adapted.keys()}
        unset = {
            name: weight
            for name, weight in plain_names(model.named_parameters()).items()
            if name in own.keys() - adapted.keys() and own[name].data_ptr() not in filled
        }
        missing = [name for name, weight in unset.items() if not weight.is_floating_point()]
        unused = adapted.keys() - own.keys()
        problems = []
        if missing:
            problems.append(
                f"leaves {len(missing)} weights of FMS's model unset: {_listed(missing)}"
            )
        if unused:
            problems.append(f"has {len(unused)} weights that nothing takes: {_listed(unused)}")
        if problems:
            raise CandidateUnavailable(
                f"{self._checkpoint} {'; it '.join(problems)}",
                "compare the checkpoint's names with FMS's adapter for it",
            )
        with torch.no_grad():
            for weight in unset.values():
                weight.fill_(torch.nan)
        return tuple(unset)

    def find_doubles(self, model: torch.nn.Module) -> dict[str, list[str]]:
        """Return the keys that FMS adapts to one weight, by its name in the model.

        Keys that FMS joins to one weight, such as query, key and value, have other shapes than it
        and are not counted.
        """
        found: dict[str, list[str]] = {}
        own = plain_names(model.state_dict().items())
        for key, weight in self.every.items():
            with suppress(Exception):  # an adapter may need the keys beside it
                for name, adapted in self._adapt(model, {key: weight}).items():
                    if name in own and own[name].shape == adapted.shape:
                        found.setdefault(name, []).append(key)
        return {name: sorted(keys) for name, keys in found.items() if len(keys) > 1}

    def pair(self, model: torch.nn.Module) -> Iterator[WeightPair]:
        """Yield the used weights, adapted as on loading, beside the model's, by layers.

        Of a split weight, yield the shard that this rank should have.
        """
        own, shards = plain_names(model.state_dict().items()), Shards(model)
        layers: dict[str, list[str]] = {}  # FMS's adapters join weights of one layer
        for name in self.used:
            numbered = re.match(r".*?\.\d+\.", name)
            layers.setdefault(numbered[0] if numbered else "", []).append(name)
        for keys in layers.values():
            # Opened again: what was read of mapped files stays in memory until they are closed.
            with _open_weights(self._checkpoint) as files:
                layer = {key: files[key].get_tensor(key) for key in keys}
                for name, adapted in self._adapt(model, layer).items():
                    actual = _own_weight(own, name)
                    expected = shards.of(name, self._only_renamed(name, layer, adapted), actual)
                    modules = partial(self._reference_modules, name)
                    yield WeightPair(name, expected, actual, modules)

    def _only_renamed(
        self, name: str, layer: Mapping[str, torch.Tensor], adapted: torch.Tensor
    ) -> torch.Tensor:
        """Return the checkpoint's own weight if FMS only renames it, else `adapted`.

        A fault of the adapter would be in both weights that are compared.
        """
        module, _, kind = name.rpartition(".")
        for hf_name, pair in pairs_of(module, self._port.module_pairs):
            weight = layer.get(f"{hf_name}.{kind}")
            is_alike = pair.part is None and not pair.rotary
            if is_alike and weight is not None and weight.shape == adapted.shape:
                return weight
        return adapted

    def _reference_modules(self, weight: str) -> tuple[str, ...]:
        module = weight.rpartition(".")[0]
        # What FMS fuses may correspond to the module around it.
        around = module.rpartition(".")[0]
        pairs = self._port.module_pairs
        return tuple(hf for hf, _ in pairs_of(module, pairs) or pairs_of(around, pairs))


def _own_weight(own: Mapping[str, torch.Tensor], name: str) -> torch.Tensor | None:
    """Return the model's weight of a name; if it was split, its parts joined."""
    for fused, parts in _FUSED.items():
        names = [name.replace(fused, part) for part in parts]
        if fused in name and name not in own and all(part in own for part in names):
            return torch.cat([own[part] for part in names])
    return own.get(name)


def _listed(names: Collection[str]) -> str:
    return ", ".join(sorted(names)[:_SHOWN]) + (" …" if len(names) > _SHOWN else "")


def stray_files(checkpoint: Path) -> list[str]:
    """Return the names of weight files that FMS reads and that are not the checkpoint's."""
    own = _weight_files(checkpoint)
    return [path.name for path in _all_files(checkpoint) if path not in own]


def _all_files(checkpoint: Path) -> list[Path]:
    # FMS skips Mistral's own layout of the same weights.
    found = checkpoint.glob("*.safetensors")
    return sorted(path for path in found if path.name != "consolidated.safetensors")


def _weight_files(checkpoint: Path) -> list[Path]:
    """Return the files that hold a checkpoint's weights, as transformers chooses them.

    Other files may be left over from an older save. If there are none, return all of the folder's.
    """
    if names := checkpoint_files.weight_files(checkpoint):
        return [checkpoint / name for name in names if name != checkpoint_files.INDEX]
    if found := _all_files(checkpoint):
        return found
    raise CheckpointUnavailable(
        f"{checkpoint} has no safetensors weights",
        "it needs model.safetensors, or model.safetensors.index.json with the files that it names",
    )


@contextmanager
def _open_weights(checkpoint: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the open file of each weight, by the weight's name.

    A weight's memory is the file's until something is computed with it.
    """
    holders: dict[str, Any] = {}
    with ExitStack() as stack:
        for path in _weight_files(checkpoint):
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise CheckpointUnavailable(f"{path} cannot be read: {error}") from error
            holders.update(dict.fromkeys(file.keys(), file))
        yield holders
