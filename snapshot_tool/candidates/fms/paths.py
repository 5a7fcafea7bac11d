"""FMS's decoders on the paths of production: other calls of a loaded model, with equal outputs.

The arguments of paged attention are those of FMS's fms.utils.spyre.paged (1.13.1), as the generate
of aiu-fms-testing-utils passes them (aiu_fms_testing_utils/utils/paged.py at 81502dd).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch.nn.functional import pad as pad_tensor

from snapshot_tool.base.errors import PhaseUnsupported
from snapshot_tool.base.protocol import CaseInputs, ExecutionPath, Observer, PathKind, Side
from snapshot_tool.families.family import Config, Family, text_config
from snapshot_tool.families.fms_calls import DecoderCalls, FmsCalls, cut_after_end

BLOCK = 64  # tokens in a block of the cache; prompts are padded to a multiple of it
# The last tokens of a prompt that forward runs one by one on a paged cache, as generation does.
_DECODED = 8
_SPARE = 4  # blocks that no prompt needs
_OPTIONAL = ("forward_batch", "generate_batch", "forward_in_parts")


def calls_on_path(calls: FmsCalls, path: ExecutionPath, family: Family) -> FmsCalls | PathCalls:
    """Return the calls of a loaded model on a path."""
    if path.kind is PathKind.EAGER:
        return calls
    if not isinstance(calls, DecoderCalls) or family.recurrent:
        reason = "padding affects its outputs" if family.recurrent else "it is not a decoder"
        return UnsupportedCalls(calls, f"{family.name} runs on the eager path only: {reason}")
    match path.kind:
        case PathKind.STATIC:
            return StaticCalls(calls)
        case PathKind.COMPILED:
            # Imported only here, because torch's compiler takes seconds.
            from snapshot_tool.candidates.fms.compiled import CompiledCalls

            return CompiledCalls(calls, path.argument, family.fms.encoder)
    try:
        import fms.utils.spyre.paged  # noqa: F401 - it registers the operators
    except ImportError as error:
        return UnsupportedCalls(calls, f"FMS has no paged attention: {error}")
    return PagedCalls(calls, chunk=int(path.argument or 0))


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of a prompt that the model is run on at the moment.

    Args:
        length: its positions.
        pads: how many of them, at its start, are padding.
        is_last: whether the prompt ends with it.
    """

    length: int
    pads: int = 0
    is_last: bool = True


class PathCalls:
    """Calls of a loaded model on a path; other methods are those of its calls on the eager one."""

    def __init__(self, own: FmsCalls) -> None:
        self.own = own
        self.piece: Piece | None = None
        for name in _OPTIONAL:
            if getattr(own, name, None) is None:
                setattr(self, name, None)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the eager path's calls."""
        return getattr(self.own, name)

    @contextmanager
    def running(self, piece: Piece) -> Iterator[None]:
        """Show observers the piece that the model is run on inside the block."""
        self.piece = piece
        try:
            yield
        finally:
            self.piece = None


class UnsupportedCalls(PathCalls):
    """Calls of a model that cannot be run on a path."""

    def __init__(self, own: FmsCalls, reason: str) -> None:
        super().__init__(own)
        self._reason = reason

    def _skip(self, *_given: object, **_options: object) -> NoReturn:
        raise PhaseUnsupported(self._reason)

    forward = generate = forward_batch = generate_batch = forward_in_parts = _skip


class PieceObserver:
    """An observer of modules that puts the pieces of a prompt together, without padding.

    Args:
        observe: called with the tensor of the whole prompt.
        calls: run the pieces.
        encoder: FMS's name of the image encoder, whose tensors are not text; "": there is none.

    Attributes:
        names: FMS's names of the modules, by the reference's.
    """

    def __init__(self, observe: Observer, calls: PathCalls, encoder: str) -> None:
        self.names: Mapping[str, str] = {}
        self._observe = observe
        self._calls = calls
        self._encoder = encoder
        self._pieces: dict[tuple[str, Side], list[torch.Tensor]] = {}

    def __call__(self, module: str, side: Side, tensor: torch.Tensor) -> torch.Tensor | None:
        """Keep a piece of a text tensor until the last one; pass other tensors on."""
        piece, name = self._calls.piece, self.names[module]
        if piece is None:
            return None
        is_image = bool(self._encoder) and f"{name}.".startswith(f"{self._encoder}.")
        if is_image or tensor.shape[:2] != (1, piece.length):
            return self._observe(module, side, tensor)
        pieces = self._pieces.setdefault((module, side), [])
        pieces.append(tensor[:, piece.pads :].clone())
        if piece.is_last:
            self._observe(module, side, torch.cat(self._pieces.pop((module, side)), dim=1))
        else:
            # Nothing to compare yet, but a module that raises has been entered.
            self._observe(module, side, tensor[:, :0])
        return None


def padded(inputs: CaseInputs, pads: int, config: Config) -> CaseInputs:
    """Return a batch with further padding on the left.

    Its token id is the configuration's, else 0 as in FMS's pad_input_ids.
    """
    found = text_config(config).get("pad_token_id")
    pad_id = found if isinstance(found, int) else 0
    return dataclasses.replace(
        inputs,
        input_ids=pad_tensor(inputs.input_ids, (pads, 0), value=pad_id),
        attention_mask=pad_tensor(inputs.attention_mask, (pads, 0), value=0),
    )


class StaticCalls(PathCalls):
    """Calls with prompts padded on the left to a multiple of 64 tokens, by FMS's pad_input_ids.

    Generation takes only the last logits of each step (last_n_tokens), if FMS's loop passes it on.
    """

    own: DecoderCalls

    def __init__(self, own: DecoderCalls) -> None:
        super().__init__(own)
        own.generation_options["last_n_tokens"] = 1

    def forward(self, inputs: CaseInputs) -> torch.Tensor:
        """Return the logits of every position, (1, length, vocabulary)."""
        return self._forward([inputs], lambda rows: self.own.forward(rows[0]))

    def forward_batch(self, rows: Sequence[CaseInputs]) -> torch.Tensor:
        """Return the logits of prompts of one length, (rows, length, vocabulary)."""
        return self._forward(rows, self.own.forward_batch)

    def forward_in_parts(self, parts: Sequence[CaseInputs]) -> torch.Tensor:
        """Return the logits of all parts of a prompt; the first one is padded."""
        first, *others = parts
        pads = -parts[-1].attention_mask.shape[1] % BLOCK
        longer = [
            dataclasses.replace(
                part, attention_mask=pad_tensor(part.attention_mask, (pads, 0), value=0)
            )
            for part in others
        ]
        found = self.own.forward_in_parts([self._pad(first, pads), *longer])
        return found[:, pads:]

    def generate(self, inputs: CaseInputs, **options: Any) -> torch.Tensor:
        """Return the greedy new tokens, the end token included."""
        return self.own.generate(self._pad(inputs, -inputs.input_ids.shape[1] % BLOCK), **options)

    def generate_batch(self, rows: Sequence[CaseInputs], **options: Any) -> list[torch.Tensor]:
        """Return the greedy new tokens of each prompt."""
        pads = -rows[0].input_ids.shape[1] % BLOCK
        return self.own.generate_batch([self._pad(row, pads) for row in rows], **options)

    def _pad(self, inputs: CaseInputs, pads: int) -> CaseInputs:
        return padded(inputs, pads, self.own.loaded.config)

    def _forward(
        self, rows: Sequence[CaseInputs], run: Callable[[Sequence[CaseInputs]], torch.Tensor]
    ) -> torch.Tensor:
        pads = -rows[0].input_ids.shape[1] % BLOCK
        longer = [self._pad(row, pads) for row in rows]
        mask = longer[0].attention_mask
        with self.running(Piece(mask.shape[1], int((mask == 0).sum()))):
            return run(longer)[:, pads:]


class PagedCalls(PathCalls):
    """Calls with paged attention.

    The keys and values of a prompt lie in blocks of 64 tokens, which follow each other in a
    shuffled order. Prompts are padded on the left. Blocks with nothing but padding share a
    reserved one.

    Args:
        own: the calls on the eager path.
        chunk: tokens in a chunk of a prompt; each attends to the cache. 0: a prompt is run at
            once, and attends to its own keys and values.

    Attributes:
        order: the seed of the order of the blocks, and of the cache's first values.
    """

    own: DecoderCalls

    def __init__(self, own: DecoderCalls, *, chunk: int = 0) -> None:
        super().__init__(own)
        self.chunk, self.order = chunk, 0

    @contextmanager
    def cache_layout(self, *, chunk: int, order: int) -> Iterator[None]:
        """Run prompts in other chunks, on blocks in another order, inside the block."""
        before = self.chunk, self.order
        self.chunk, self.order = chunk, order
        try:
            yield
        finally:
            self.chunk, self.order = before

    def forward(self, inputs: CaseInputs) -> torch.Tensor:
        """Return the logits of every position, (1, length, vocabulary); zeros for padding.

        The last few tokens are run one by one, because prompts that are run at once do not read
        the cache.
        """
        return self._forward([inputs])

    def forward_batch(self, rows: Sequence[CaseInputs]) -> torch.Tensor:
        """Return the logits of prompts of one length, (rows, length, vocabulary)."""
        return self._forward(rows)

    def forward_in_parts(self, parts: Sequence[CaseInputs]) -> torch.Tensor:
        """Return the logits of all parts of a prompt; each but the first attends to the cache."""
        whole = _joined(parts)
        ends = [part.attention_mask.shape[1] for part in parts]
        run = self._start([whole], ends[-1])
        shift = run.end - ends[-1]
        logits = run.prefill(0, [end + shift for end in ends])
        return _with_padding(logits, whole.input_ids.shape[1])

    def generate(
        self, inputs: CaseInputs, *, max_new_tokens: int, eos_token_ids: Sequence[int]
    ) -> torch.Tensor:
        """Return the greedy new tokens, the end token included."""
        return self._generate([inputs], max_new_tokens, eos_token_ids)[0]

    def generate_batch(
        self, rows: Sequence[CaseInputs], *, max_new_tokens: int, eos_token_ids: Sequence[int]
    ) -> list[torch.Tensor]:
        """Return the greedy new tokens of each prompt, its own end token included."""
        return self._generate(rows, max_new_tokens, eos_token_ids)

    def _generate(
        self, rows: Sequence[CaseInputs], max_new_tokens: int, eos_token_ids: Sequence[int]
    ) -> list[torch.Tensor]:
        run = self._start(rows, rows[0].input_ids.shape[1], room=max_new_tokens)
        # As in aiu-fms-testing-utils: the logits of the last 64 of a prompt, one of each step.
        prompts = [run.prefill(i, run.ends, last_n_tokens=BLOCK) for i in range(len(rows))]
        logits = torch.cat([found[:, -1] for found in prompts])
        ends = torch.tensor(list(eos_token_ids), device=logits.device)
        new = logits.argmax(-1, keepdim=True)
        while new.shape[1] < max_new_tokens and not bool(torch.isin(new, ends).any(1).all()):
            logits = run.decode(new[:, -1:], last_n_tokens=1)[:, -1]
            new = torch.cat([new, logits.argmax(-1, keepdim=True)], dim=1)
        return [cut_after_end(row, eos_token_ids) for row in new]

    def _forward(self, rows: Sequence[CaseInputs]) -> torch.Tensor:
        length = rows[0].input_ids.shape[1]
        decoded = self._decoded(rows)
        run = self._start(rows, length - decoded, room=decoded)
        found = []
        for index in range(len(rows)):
            logits = run.prefill(index, run.ends, is_last=not decoded)
            found.append(_with_padding(logits, length - decoded))
        steps = [torch.cat(found)]
        for place in range(length - decoded, length):
            tokens = torch.cat([row.input_ids[:, place : place + 1] for row in rows])
            steps.append(run.decode(tokens, is_last=place == length - 1))
        return torch.cat(steps, dim=1)

    def _decoded(self, rows: Sequence[CaseInputs]) -> int:
        """Return how many last tokens are run one by one: none of them is of an image."""
        config = self.own.loaded.config
        names = ("image_token_id", "image_token_index")
        images = [config[name] for name in names if config.get(name) is not None]
        ids = torch.cat([row.input_ids for row in rows])
        image = torch.isin(ids, torch.tensor(images, device=ids.device)).any(0)
        text = int((image.flip(0).cumsum(0) == 0).sum())
        return min(_DECODED, text, *(int(row.attention_mask.sum()) - 1 for row in rows))

    def _start(self, rows: Sequence[CaseInputs], length: int, *, room: int = 0) -> PagedRun:
        """Return the rows on an empty cache: `length` tokens of prompts, `room` new ones."""
        end = length + -length % (self.chunk or BLOCK)
        longer = [padded(row, end - length, self.own.loaded.config) for row in rows]
        return PagedRun(self, longer, end, room=room)

    @functools.cached_property
    def layers(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of one token in each layer, (1, heads, 1, width), for their shapes."""
        device = next(self.own.model.parameters()).device
        one = torch.zeros(1, 1, dtype=torch.int64, device=device)
        _, cache = self.own.forward_on_cache(CaseInputs(one, torch.ones_like(one)), None, {})
        for layer in cache:
            if not isinstance(layer, tuple | list) or [t.dim() for t in layer] != [4, 4]:
                raise PhaseUnsupported("FMS's cache of this model is not one of keys and values")
        return [(keys, values) for keys, values in cache]


@dataclass(slots=True)
class _Sequence:
    """A prompt on a paged cache.

    Args:
        inputs: (1, length) ids and mask, padded on the left.
        embedded: the model's first argument for all of it: ids or embeddings.
        pads: its positions of padding.
        blocks: the block of each 64 positions.
    """

    inputs: CaseInputs
    embedded: torch.Tensor
    pads: int
    blocks: list[int]

    def slots(self, start: int, end: int) -> list[int]:
        """Return the slots of some positions."""
        return [self.blocks[i // BLOCK] * BLOCK + i % BLOCK for i in range(start, end)]


class PagedRun:
    """Prompts of one length on a new paged cache.

    The cache begins with random values, as a used one does: what was not stored must not be read.

    Args:
        calls: run the model.
        rows: the prompts, padded on the left.
        end: the positions that `prefill` runs; later ones are decoded.
        room: how many tokens are decoded at most.

    Attributes:
        end: the positions that each row has on the cache, padding included.
    """

    def __init__(
        self,
        calls: PagedCalls,
        rows: Sequence[CaseInputs],
        end: int,
        *,
        room: int,
    ) -> None:
        self.end = end
        self._calls = calls
        self._name = "spyre_paged_attn"
        if any(getattr(m, "has_sinks", False) for m in calls.own.model.modules()):
            self._name = "spyre_paged_attn_with_sinks"
        generator = torch.Generator().manual_seed(calls.order)
        count = 1 + len(rows) * (-(-(end + room) // BLOCK) + 1) + _SPARE
        self._free = torch.randperm(count, generator=generator).tolist()
        reserved = self._free.pop()
        self._cache: Any = [
            tuple(
                torch.randn(count, BLOCK, one.shape[1], one.shape[3], generator=generator).to(one)
                for one in layer
            )
            for layer in calls.layers
        ]
        self._rows = []
        for row in rows:
            pads = int((row.attention_mask[0, :end] == 0).sum())
            own = [self._free.pop() for _ in range(pads // BLOCK, -(-end // BLOCK))]
            with calls.running(Piece(row.input_ids.shape[1], pads)):
                embedded = calls.own.embed(row)
            self._rows.append(_Sequence(row, embedded, pads, [reserved] * (pads // BLOCK) + own))

    @property
    def ends(self) -> Sequence[int]:
        """Where each chunk of the prompts ends."""
        chunk = self._calls.chunk
        return range(chunk, self.end + 1, chunk) if chunk else [self.end]

    def prefill(
        self, index: int, ends: Sequence[int], *, is_last: bool = True, **options: Any
    ) -> torch.Tensor:
        """Run the prompt of a row; return its logits, (1, positions, vocabulary).

        ends: where each of its chunks ends; the last one is `end`. Chunks and blocks of padding
        alone are left out. options: further arguments of the model.
        """
        row = self._rows[index]
        text = CaseInputs(
            row.inputs.input_ids[:, : self.end], row.inputs.attention_mask[:, : self.end]
        )
        seen = self._calls.own.pad(text)
        start = row.pads // BLOCK * BLOCK
        if self._calls.chunk:
            start = max((end for end in ends if end <= row.pads), default=0)
        found: list[torch.Tensor] = []
        for end in (end for end in ends if end > row.pads):
            given: dict[str, Any] = {"mask": seen["mask"][:, None, start:end, start:end]}
            if self._calls.chunk or found:
                given = self._seen([row], end)
            given["position_ids"] = seen["position_ids"][:, start:end]
            given["slot_mapping"] = self._tensor([row.slots(start, end)])
            pads = max(0, row.pads - start)
            with self._calls.running(Piece(end - start, pads, is_last and end == self.end)):
                found.append(self._step(row.embedded[:, start:end], {**given, **options}))
            start = end
        return torch.cat(found, dim=1)

    def decode(self, tokens: torch.Tensor, *, is_last: bool = True, **options: Any) -> torch.Tensor:
        """Run one more token of each row, (rows, 1); return its logits, (rows, 1, vocabulary)."""
        if self.end % BLOCK == 0:
            for row in self._rows:
                row.blocks.append(self._free.pop())
        given = self._seen(self._rows, self.end + 1)
        given["position_ids"] = self._tensor([[self.end - row.pads] for row in self._rows])
        given["slot_mapping"] = self._tensor(
            [row.slots(self.end, self.end + 1) for row in self._rows]
        )
        self.end += 1
        embedded = self._calls.own.embed(CaseInputs(tokens, torch.ones_like(tokens)))
        with self._calls.running(Piece(1, 0, is_last)):
            return self._step(embedded, {**given, **options})

    def _seen(self, rows: Sequence[_Sequence], end: int) -> dict[str, Any]:
        """Return the arguments with the slots that each row attends to, up to a position."""
        return {
            "mask": None,
            "block_table": self._tensor([row.blocks[: -(-end // BLOCK)] for row in rows]),
            "current_tkv_mask": self._tensor([end] * len(rows)),
            "left_padded_prompt_mask": self._tensor([row.pads for row in rows]),
        }

    def _step(self, embedded: torch.Tensor, given: Mapping[str, Any]) -> torch.Tensor:
        given = {"attn_name": self._name, **given}
        logits, self._cache = self._calls.own.step(embedded, self._cache, given)
        return logits

    def _tensor(self, values: list[Any]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._rows[0].embedded.device)


def _joined(parts: Sequence[CaseInputs]) -> CaseInputs:
    """Return the parts of a prompt as one."""

    def join(name: str) -> torch.Tensor | None:
        tensors = [value for part in parts if (value := getattr(part, name)) is not None]
        return torch.cat(tensors) if tensors else None

    return dataclasses.replace(
        parts[-1],
        input_ids=torch.cat([part.input_ids for part in parts], dim=1),
        pixel_values=join("pixel_values"),
        pixel_attention_mask=join("pixel_attention_mask"),
    )


def _with_padding(logits: torch.Tensor, length: int) -> torch.Tensor:
    """Return the last `length` positions of logits, with zeros at positions that were not run."""
    logits = logits[:, -length:]
    return pad_tensor(logits, (0, 0, length - logits.shape[1], 0))
