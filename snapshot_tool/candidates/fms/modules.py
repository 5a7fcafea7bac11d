"""Observe FMS's modules under Hugging Face's names, and replace their outputs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from snapshot_tool.base.errors import CandidateUnavailable
from snapshot_tool.base.protocol import Observer, Side
from snapshot_tool.candidates.fms.shards import Shards
from snapshot_tool.families.family import ModulePair, pairs_of
from snapshot_tool.taps.hooks import (
    first_tensor,
    plain_modules,
    replace_first_tensor,
    run_eagerly,
    watch_modules,
)

_PLAIN = inspect.Parameter.POSITIONAL_OR_KEYWORD


@dataclass(frozen=True)
class PairedModules:
    """FMS's modules and the Hugging Face modules that they correspond to.

    head_dim: elements of one head of the text model, for FMS's rotary order.
    """

    model: torch.nn.Module
    pairs: Sequence[ModulePair]
    head_dim: int

    def outputs(self, module: str, output: object) -> dict[str, torch.Tensor]:
        """Return the outputs of the Hugging Face modules that an FMS module's output holds.

        They have Hugging Face's names and layout.
        """
        found = {name: self._part_of(output, pair) for name, pair in pairs_of(module, self.pairs)}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def _part_of(self, output: object, pair: ModulePair) -> torch.Tensor | None:
        tensor = first_tensor(output)
        if pair.part is not None:
            if isinstance(output, (tuple, list)):
                tensor = first_tensor(output[pair.part])
            elif tensor is not None:
                tensor = tensor.chunk(pair.parts, dim=-1)[pair.part]
        if tensor is None or not pair.rotary:
            return tensor
        return undo_rotary_order(tensor, self.head_dim)

    def _found(self) -> dict[str, tuple[torch.nn.Module, list[tuple[str, ModulePair]]]]:
        """Return FMS's modules that have a pair, by their names."""
        return {
            name: (module, pairs)
            for name, module in plain_modules(self.model).items()
            if (pairs := pairs_of(name, self.pairs))
        }

    @contextmanager
    def observed(self, observe: Observer) -> Iterator[Mapping[str, str]]:
        """Observe every module that has a pair; yield FMS's names by Hugging Face's.

        What is split over several ranks is gathered. A tensor that `observe` returns takes the
        place of the one that it was given.
        """
        found, shards = self._found(), Shards(self.model)

        def watch(name: str, side: Side, value: Any) -> Any:
            pairs, is_input = found[name][1], side is Side.INPUT
            # Of several modules of Hugging Face, the inner one is entered last and finishes first.
            for hf_name, pair in pairs if is_input else reversed(pairs):
                tensor = first_tensor(value) if is_input else self._part_of(value, pair)
                if tensor is None:
                    continue
                replaced = observe(hf_name, side, shards.gather(name, side, tensor, pair.part))
                if replaced is not None and is_input:
                    value = replace_first_tensor(value, replaced)
                elif replaced is not None:
                    value = self._with_part(value, pair, replaced)
            return value

        modules = [(name, module) for name, (module, _) in found.items()]
        with run_eagerly(), watch_modules(modules, watch):
            yield {hf_name: name for name, (_, pairs) in found.items() for hf_name, _ in pairs}

    @cached_property
    def _by_hf_name(self) -> dict[str, tuple[str, torch.nn.Module, ModulePair]]:
        return {
            hf_name: (name, module, pair)
            for name, (module, pairs) in self._found().items()
            for hf_name, pair in pairs
        }

    def run(self, module: str, given: torch.Tensor) -> tuple[str, torch.Tensor] | None:
        """Run FMS's pair of a Hugging Face module by itself; return its name and output, or None.

        A projection that fuses query, key and value takes three inputs, of which two may be None.
        """
        if module not in self._by_hf_name:
            return None
        name, own, pair = self._by_hf_name[module]
        parameters = inspect.signature(own.forward).parameters.values()
        needed = [p for p in parameters if p.default is p.empty and p.kind is _PLAIN]
        shards = Shards(self.model)
        with run_eagerly():
            answer = own(shards.share(name, given), *[None] * (len(needed) - 1))
        found = self._part_of(answer, pair)
        return None if found is None else (name, shards.gather(name, Side.OUTPUT, found, pair.part))

    @contextmanager
    def grafted(self, module: str, output: torch.Tensor) -> Iterator[str]:
        """Let FMS's pair of a Hugging Face module return `output`; yield FMS's name of it.

        Only the output of the first call of each run is replaced: only that was recorded.
        Raises CandidateUnavailable if FMS has no such module, or lays its output out differently.
        """
        modules = plain_modules(self.model)
        found = ((n, pair) for n in modules for hf, pair in pairs_of(n, self.pairs) if hf == module)
        name, pair = next(found, ("", None))
        if pair is None:
            raise CandidateUnavailable(
                f"FMS's model has no module that is {module}",
                "see snap check --localise for the names",
            )
        depth, done = 0, False

        def count(_name: str, side: Side, _value: object) -> None:
            nonlocal depth, done
            depth += 1 if side is Side.INPUT else -1
            done = done and depth > 0

        def replace(_module: object, _arguments: object, answer: Any) -> Any:
            nonlocal done
            if done:
                return answer
            done = True
            own = self._part_of(answer, pair)
            if own is None or own.shape != output.shape:
                shape = None if own is None else tuple(own.shape)
                raise CandidateUnavailable(
                    f"cannot graft {module}: it is {tuple(output.shape)}, FMS's {name} returns "
                    f"{shape}",
                    "graft the module that holds it",
                )
            return self._with_part(answer, pair, output.to(own.device, own.dtype))

        handle = modules[name].register_forward_hook(replace)
        try:
            with run_eagerly(), watch_modules(modules.items(), count):
                yield name
        finally:
            handle.remove()

    def _with_part(self, answer: Any, pair: ModulePair, output: torch.Tensor) -> Any:
        """Return what FMS's module returned with one Hugging Face module's part replaced."""
        part = redo_rotary_order(output, self.head_dim) if pair.rotary else output
        if pair.part is None:
            return replace_first_tensor(answer, part)
        if isinstance(answer, (tuple, list)):
            pieces = list(answer)
            pieces[pair.part] = replace_first_tensor(pieces[pair.part], part)
            return type(answer)(pieces)
        pieces = list(answer.chunk(pair.parts, dim=-1))
        pieces[pair.part] = part
        return torch.cat(pieces, dim=-1)


def undo_rotary_order(tensor: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Return (..., heads * head_dim) with both halves of each head apart, as Hugging Face has it.

    FMS permutes the query and key weights on loading (fms.models.llama._hf_to_fms_rope), so that
    the two elements that rotate together are neighbours.
    """
    shape = tensor.shape
    pairs = tensor.reshape(*shape[:-1], -1, head_dim // 2, 2)
    return pairs.transpose(-1, -2).reshape(shape)


def redo_rotary_order(tensor: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Return (..., heads * head_dim) in FMS's order: the inverse of `undo_rotary_order`."""
    shape = tensor.shape
    halves = tensor.reshape(*shape[:-1], -1, 2, head_dim // 2)
    return halves.transpose(-1, -2).reshape(shape)
