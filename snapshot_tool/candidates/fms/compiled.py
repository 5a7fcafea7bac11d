"""FMS's decoders compiled by torch.compile, on inputs of static shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch._dynamo import config
from torch._dynamo.utils import counters

from snapshot_tool.base.errors import CandidateUnavailable
from snapshot_tool.base.protocol import CaseInputs
from snapshot_tool.candidates.fms.paths import BLOCK, StaticCalls
from snapshot_tool.families.fms_calls import DecoderCalls

T = TypeVar("T")

_SHAPES = 256  # how often torch may compile the model for inputs of other shapes


class CompiledCalls(StaticCalls):
    """Calls on static shapes of a model that torch.compile compiles, with dynamic=False.

    Inputs of new shapes are run twice: the first run compiles, the second is the answer.

    Args:
        own: the calls on the eager path.
        backend: of torch.compile.
        encoder: FMS's name of the image encoder, which vision calls by itself; "": there is none.

    Raises CandidateUnavailable for an unknown backend.
    """

    def __init__(self, own: DecoderCalls, backend: str, encoder: str) -> None:
        super().__init__(own)
        known = torch.compiler.list_backends(exclude_tags=())
        if backend not in known:
            raise CandidateUnavailable(
                f"torch.compile has no backend {backend}", f"it has: {', '.join(known)}"
            )
        # Every number of tiles and multiple of 64 is a shape of its own; after 8 of them torch
        # would run the model eagerly.
        config.recompile_limit = _SHAPES
        modules = dict(own.model.named_modules())
        for module in [own.model, *([modules[encoder]] if encoder in modules else [])]:
            module.compile(backend=backend, dynamic=False)
        self._shapes: set[Any] = set()
        self._counted = {"graphs": _count_graphs(), "breaks": _count_breaks(), "late": 0}

    @property
    def notes(self) -> dict[str, None]:
        """The notes of the eager path's calls, and what was compiled."""
        graphs = _count_graphs() - self._counted["graphs"]
        breaks = _count_breaks() - self._counted["breaks"]
        late = self._counted["late"]
        text = (
            f"torch.compile: {graphs} graphs, {breaks} graph breaks, {late} graphs compiled again "
            "after a warm-up"
        )
        return {**self.own.notes, text: None}

    def forward(self, inputs: CaseInputs) -> torch.Tensor:
        """Return the logits of every position, (1, length, vocabulary)."""
        return self._run(super().forward, [inputs], inputs)

    def forward_batch(self, rows: Sequence[CaseInputs]) -> torch.Tensor:
        """Return the logits of prompts of one length, (rows, length, vocabulary)."""
        return self._run(super().forward_batch, rows, rows)

    def forward_in_parts(self, parts: Sequence[CaseInputs]) -> torch.Tensor:
        """Return the logits of all parts of a prompt."""
        return self._run(super().forward_in_parts, parts, parts)

    def generate(self, inputs: CaseInputs, **options: Any) -> torch.Tensor:
        """Return the greedy new tokens, the end token included."""
        return self._run(super().generate, [inputs], inputs, **options)

    def generate_batch(self, rows: Sequence[CaseInputs], **options: Any) -> list[torch.Tensor]:
        """Return the greedy new tokens of each prompt."""
        return self._run(super().generate_batch, rows, rows, **options)

    def _run(
        self, method: Callable[..., T], inputs: Sequence[CaseInputs], *given: Any, **options: Any
    ) -> T:
        """Call a method; call it twice for inputs of new shapes."""
        shapes = [
            (
                -(-one.attention_mask.shape[1] // BLOCK),
                () if one.pixel_values is None else tuple(one.pixel_values.shape),
            )
            for one in inputs
        ]
        key = method.__name__, str(shapes), str(options)
        if key not in self._shapes:
            self._shapes.add(key)
            method(*given, **options)
        before = _count_graphs()
        answer = method(*given, **options)
        self._counted["late"] += _count_graphs() - before
        return answer


# torch 2.5 to 2.13 count both here only; the module is named in torch's troubleshooting guide.
def _count_graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def _count_breaks() -> int:
    return sum(counters["graph_break"].values())
