"""How FMS's models are called, phase by phase: what most families share, for them to build on.

Nothing here imports FMS: the candidate passes the model, FMS's package and the generation loop.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snapshot_tool.base.protocol import CaseInputs

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class LoadedFms:
    """A loaded FMS model, with what a family calls of FMS.

    Args:
        model: FMS's model, in evaluation mode.
        models: the package fms.models.
        loop: fms.utils.generation.generate.
        pad: fms.utils.generation.pad_input_ids, or None if FMS has none.
        checkpoint: the checkpoint's folder.
        config: Hugging Face's configuration.
    """

    model: Any
    models: Any
    loop: Callable[..., Any]
    pad: Callable[..., Any] | None
    checkpoint: Path
    config: Mapping[str, Any]


EndToken = int | list[int] | None


class FmsCalls:
    """One method for each phase that FMS implements; a phase without a method is not supported.

    Inputs are on the model's device. `causal`: whether a token attends only to those before it.
    """

    causal = True

    def __init__(self, loaded: LoadedFms) -> None:
        self.loaded = loaded
        self.model = loaded.model
        self.notes: dict[str, None] = {}
        self.generation_options: dict[str, Any] = {}  # further arguments of the model

    def padding(self, inputs: CaseInputs) -> dict[str, torch.Tensor]:
        """Return mask and position ids of padded prompts; whole ones need neither."""
        return {} if bool(inputs.attention_mask.all()) else self.pad(inputs)

    def pad(self, inputs: CaseInputs, *, offset: int = 0) -> dict[str, torch.Tensor]:
        """Return `mask` and `position_ids` of prompts, by FMS's own pad_input_ids.

        The mask is additive, (rows, length, length); an encoder's padding attends to the text. The
        positions, (rows, length), begin at `offset`. The ids of the padding are those of the
        prompts, not FMS's choice, which is 0 before 1.10.1: some heads, and Mamba's state, depend
        on them.
        """
        import torch

        real = inputs.attention_mask.bool()
        side = "left" if bool(real[:, -1].all()) else "right"
        pad = self.loaded.pad
        known = inspect.signature(pad).parameters if pad else {}
        if pad is None or (side == "right" and "padding_side" not in known):
            return _own_padding(real, causal=self.causal, offset=offset)
        options = {
            "padding_side": side,
            "min_pad_length": real.shape[1],
            "is_causal_mask": self.causal,
            "position_ids_offset": offset,
            "pad_token_id": 0 if bool(real.all()) else int(inputs.input_ids[~real][0]),
        }
        rows = [ids[kept] for ids, kept in zip(inputs.input_ids, real, strict=True)]
        found = pad(rows, **{n: v for n, v in options.items() if n in known})
        seen: dict[str, torch.Tensor] = found[1]
        mask, at_text = seen["mask"], real[:, :, None]
        if bool(((mask == 0) & at_text & ~real[:, None, :]).any()):
            self.notes.setdefault("FMS's pad_input_ids lets tokens attend to padding")
        if not self.causal:
            # As in Hugging Face's encoders: a head that reads the first position reads padding if
            # the prompt is padded on the left.
            text_only = torch.where(real[:, None, :], 0.0, -torch.inf).to(mask.dtype)
            seen["mask"] = torch.where(at_text, mask, text_only)
        return seen

    def end_token(self, ends: Sequence[int]) -> EndToken:
        """Return FMS's end token for a generation: all of them if it takes several.

        None if there is none, or if it takes a single one and there are several: it then generates
        to the last token and must be cut. That is noted, since it goes unchecked.
        """
        if len(ends) < 2:  # noqa: PLR2004
            return next(iter(ends), None)
        annotation = inspect.signature(self.generation).parameters["eos_token_id"].annotation
        if any(word in str(annotation).lower() for word in ("list", "sequence", "iterable")):
            return list(ends)
        self.notes.setdefault(
            f"FMS's generation takes one end token, the checkpoint has {len(ends)}: it was given "
            "none and cut after the first, so where it ends by itself is not checked"
        )
        return None

    @property
    def generation(self) -> Callable[..., Any]:
        """FMS's function that generates."""
        return self.loaded.loop


class DecoderCalls(FmsCalls):
    """A language model: ids in, logits out, generation by FMS's loop with its cache."""

    def forward(self, inputs: CaseInputs) -> torch.Tensor:
        """Return the logits of every position, (1, length, vocabulary)."""
        logits: torch.Tensor = self.model(self.embed(inputs), **self.padding(inputs))
        return logits

    def generate(
        self, inputs: CaseInputs, *, max_new_tokens: int, eos_token_ids: Sequence[int]
    ) -> torch.Tensor:
        """Return the greedy new tokens, the end token included."""
        end = self.end_token(eos_token_ids)
        new = self.new_tokens([inputs], max_new_tokens, end)[0]
        return cut_after_end(new, eos_token_ids) if end is None else new

    def forward_batch(self, rows: Sequence[CaseInputs]) -> torch.Tensor:
        """Return the logits of prompts padded to one length, (rows, length, vocabulary)."""
        return self.forward(join_rows(rows))

    def generate_batch(
        self, rows: Sequence[CaseInputs], *, max_new_tokens: int, eos_token_ids: Sequence[int]
    ) -> list[torch.Tensor]:
        """Return the greedy new tokens of each prompt, its own end token included."""
        # FMS's loop stops all rows at the first one's end token, so it is given none.
        rows_new = self.new_tokens(rows, max_new_tokens, None)
        return [cut_after_end(new, eos_token_ids) for new in rows_new]

    def forward_in_parts(self, parts: Sequence[CaseInputs]) -> torch.Tensor:
        """Return the logits of all parts of a prompt, each run on the cache of those before it.

        A part has its own ids; its attention mask is of all parts up to its end.
        """
        import torch

        ids = torch.cat([part.input_ids for part in parts], dim=1)
        found, cache = [], None
        for part in parts:
            length, new = part.attention_mask.shape[1], part.input_ids.shape[1]
            whole = self.pad(CaseInputs(ids[:, :length], part.attention_mask))
            seen = {name: tensor[:, -new:] for name, tensor in whole.items()}
            logits, cache = self.forward_on_cache(part, cache, seen)
            found.append(logits)
        return torch.cat(found, dim=1)

    def forward_on_cache(
        self, part: CaseInputs, cache: Any, seen: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, Any]:
        """Return the logits of a part of a prompt, and the cache; seen: its mask and positions."""
        return self.step(self.embed(part), cache, seen)

    def step(
        self, embedded: torch.Tensor, cache: Any, seen: Mapping[str, Any]
    ) -> tuple[torch.Tensor, Any]:
        """Return the logits of what `embed` returns, run on a cache, and the cache.

        seen: further arguments of FMS's model.
        """
        logits, cache = self.model(embedded, past_key_value_states=cache, use_cache=True, **seen)
        return logits, cache

    def new_tokens(
        self, rows: Sequence[CaseInputs], max_new_tokens: int, end: EndToken
    ) -> torch.Tensor:
        """Return the greedy new tokens of prompts of one length, (rows, new tokens)."""
        inputs = join_rows(rows)
        length = inputs.input_ids.shape[1]
        hook = self.hook()
        # FMS before 1.0 has no hooks.
        hooks = {} if hook is None else {"prepare_model_inputs_hook": hook}
        ids: torch.Tensor = self.generation(
            self.model,
            inputs.input_ids,
            max_seq_len=length + max_new_tokens,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=end,
            extra_kwargs={
                **self.images(inputs),
                **self.padding(inputs),
                **self.generation_options,
            },
            **hooks,
        )
        return ids[:, length:]

    def embed(self, inputs: CaseInputs) -> torch.Tensor:
        """Return the model's first argument: ids, or embeddings with images among them."""
        return inputs.input_ids

    def hook(self) -> Callable[..., Any] | None:
        """Return what the loop calls before the model, or None."""
        return None

    def images(self, inputs: CaseInputs) -> dict[str, torch.Tensor]:
        """Return the images as the loop's hook takes them."""
        return {}


class ImageTextCalls(DecoderCalls):
    """A language model with images, which FMS embeds in a hook before the first step.

    FMS uses the images of a batch for its first row, so several prompts are not joined.
    """

    forward_batch = None  # type: ignore[assignment]
    generate_batch = None  # type: ignore[assignment]

    def embed(self, inputs: CaseInputs) -> torch.Tensor:
        """Return the embeddings of the prompt, images written over their placeholders."""
        given = {"use_cache": False, **self.images(inputs)}
        embedded: torch.Tensor = self.hook()(0, inputs.input_ids, given)[0]
        return embedded

    def hook(self) -> Callable[..., Any]:
        """Return FMS's own."""
        hook: Callable[..., Any] = self.model.prepare_inputs_for_generation
        return hook

    def images(self, inputs: CaseInputs) -> dict[str, torch.Tensor]:
        """Return pixel values and the images' sizes; nothing for a prompt without images."""
        found = {"pixel_values": inputs.pixel_values, "image_sizes": inputs.image_sizes}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


class EncoderCalls(FmsCalls):
    """An encoder: every real token attends to every other one."""

    causal = False

    def forward(self, inputs: CaseInputs) -> Mapping[str, torch.Tensor]:
        """Return the last hidden state and what `head_outputs` makes of the head's answer."""
        hidden: list[torch.Tensor] = []
        base = self.model.base_model
        handle = base.register_forward_hook(lambda _module, _given, out: hidden.append(out))
        try:
            types = inputs.token_type_ids
            given = {} if types is None else {"token_type_ids": types}
            answer = self.model(inputs.input_ids, **self.padding(inputs), **given)
        finally:
            handle.remove()
        return {"last_hidden_state": hidden[0], **self.head_outputs(answer)}

    def forward_batch(self, rows: Sequence[CaseInputs]) -> Mapping[str, torch.Tensor]:
        """Return what forward returns, of prompts padded to one length: a row for each."""
        return self.forward(join_rows(rows))

    def head_outputs(self, answer: Any) -> dict[str, torch.Tensor]:
        """Return the head's answer by name: logits of every position."""
        return {"logits": answer}


class VisionCalls(FmsCalls):
    """A vision encoder by itself, with the head that pools its output."""

    def vision(
        self, pixel_values: torch.Tensor, *, image_sizes: torch.Tensor | None = None
    ) -> Mapping[str, torch.Tensor]:
        """Return the last hidden state, (tiles, patches, width), and what is pooled of it."""
        features, pooled = self.model(pixel_values)
        return {"last_hidden_state": features, "pooler_output": pooled}


def _own_padding(real: torch.Tensor, *, causal: bool, offset: int) -> dict[str, torch.Tensor]:
    """Return mask and position ids for an FMS without pad_input_ids; real: (rows, length) bool.

    A decoder's padding attends to padding: a row that attends to nothing would turn into NaN.
    """
    import torch

    seen = (real[:, :, None] == real[:, None, :]).tril() if causal else real[:, None, :]
    return {
        "mask": torch.where(seen, 0.0, -torch.inf).expand(-1, real.shape[1], -1),
        "position_ids": (real.cumsum(-1) - 1).clamp(min=0) + offset,
    }


def cut_after_end(new: torch.Tensor, ends: Sequence[int]) -> torch.Tensor:
    """Return new tokens up to the first end token, included."""
    import torch

    places = torch.isin(new, torch.tensor(list(ends), device=new.device)).nonzero()
    return new[: int(places[0]) + 1] if len(places) else new


def join_rows(rows: Sequence[CaseInputs]) -> CaseInputs:
    """Return prompts of one length as one batch; the tiles of all rows follow each other."""
    import torch

    if len(rows) == 1:
        return rows[0]
    pixels = [row.pixel_values for row in rows if row.pixel_values is not None]
    return CaseInputs(
        torch.cat([row.input_ids for row in rows]),
        torch.cat([row.attention_mask for row in rows]),
        torch.cat(pixels) if pixels else None,
    )
