"""How FMS's models are called, phase by phase: what most families share, for them to build on.

Nothing here imports FMS: the candidate hands in the model, its module and the generation loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snapshot_tool.core.interfaces import CaseInputs

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class LoadedFms:
    """What a family's calls work with.

    Args:
        model: FMS's model, in evaluation mode.
        module: FMS's module of the family.
        loop: fms.utils.generation.generate.
        checkpoint: the checkpoint's folder.
        config: Hugging Face's configuration.
    """

    model: Any
    module: Any
    loop: Callable[..., Any]
    checkpoint: Path
    config: Mapping[str, Any]


class FmsCalls:
    """One method for each phase that FMS has of a family; a phase without a method is lacking.

    Tensors come in on the model's device.
    """

    def __init__(self, loaded: LoadedFms) -> None:
        self.loaded = loaded
        self.model = loaded.model


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
        end = eos_token_ids[0] if len(eos_token_ids) == 1 else None
        ids = self._loop(inputs, max_new_tokens=max_new_tokens, end=end)
        return cut_after_end(ids[0, inputs.input_ids.shape[1] :], eos_token_ids)

    def forward_batch(self, rows: Sequence[CaseInputs]) -> torch.Tensor:
        """Return the logits of prompts padded to one length, (rows, length, vocabulary)."""
        return self.forward(join_rows(rows))

    def generate_batch(
        self, rows: Sequence[CaseInputs], *, max_new_tokens: int, eos_token_ids: Sequence[int]
    ) -> list[torch.Tensor]:
        """Return the greedy new tokens of each prompt, its own end token included."""
        inputs = join_rows(rows)
        length = inputs.input_ids.shape[1]
        # FMS's loop stops all rows at the first one's end token: it is given none.
        ids = self._loop(inputs, max_new_tokens=max_new_tokens, end=None)
        return [cut_after_end(new, eos_token_ids) for new in ids[:, length:]]

    def forward_in_parts(self, parts: Sequence[CaseInputs]) -> torch.Tensor:
        """Return the logits of all parts of a prompt, each run on the cache of those before it."""
        import torch

        logits, cache = [], None
        for part in parts:
            seen = self.padding(part, cached=cache is not None)
            answer, cache = self.model(
                self.embed(part), past_key_value_states=cache, use_cache=True, **seen
            )
            logits.append(answer)
        return torch.cat(logits, dim=1)

    def _loop(self, inputs: CaseInputs, *, max_new_tokens: int, end: int | None) -> torch.Tensor:
        ids: torch.Tensor = self.loaded.loop(
            self.model,
            inputs.input_ids,
            max_seq_len=inputs.input_ids.shape[1] + max_new_tokens,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=end,
            prepare_model_inputs_hook=self.hook(),
            extra_kwargs={**self.images(inputs), **self.padding(inputs)},
        )
        return ids

    def embed(self, inputs: CaseInputs) -> torch.Tensor:
        """Return what the model is called with: ids, or embeddings with images among them."""
        return inputs.input_ids

    def hook(self) -> Callable[..., Any] | None:
        """Return what the loop calls before the model, or None."""
        return None

    def images(self, inputs: CaseInputs) -> dict[str, torch.Tensor]:
        """Return what the loop's hook is given of the images."""
        return {}

    def padding(self, inputs: CaseInputs, *, cached: bool = False) -> dict[str, Any]:
        """Return what FMS's pad_input_ids gives for a padded prompt; nothing for a whole one.

        cached: tokens before these are in the cache, and the attention mask is of them too.
        """
        if bool(inputs.attention_mask.all()) and not cached:
            return {}
        real = inputs.attention_mask.bool()
        seen = (real[:, :, None] == real[:, None, :]).tril()
        new = inputs.input_ids.shape[1]
        return {
            "mask": additive_mask(seen, like=next(self.model.parameters()))[:, -new:],
            "position_ids": (inputs.attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -new:],
        }


class ImageTextCalls(DecoderCalls):
    """A language model with images, which FMS embeds in a hook before the first step.

    FMS takes the images of a batch for those of its first row: several prompts are not joined.
    """

    forward_batch = None  # type: ignore[assignment]
    generate_batch = None  # type: ignore[assignment]

    def embed(self, inputs: CaseInputs) -> torch.Tensor:
        """Return the embeddings of the prompt, images written over their placeholders."""
        embedded: torch.Tensor = self.model.prepare_inputs_for_generation(
            0, inputs.input_ids, self.images(inputs)
        )[0]
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
    """An encoder: every real token sees every other one."""

    def forward(self, inputs: CaseInputs) -> Mapping[str, torch.Tensor]:
        """Return the last hidden state and what `head_outputs` makes of the head's answer."""
        hidden: list[torch.Tensor] = []
        base = self.model.base_model
        handle = base.register_forward_hook(lambda _module, _given, out: hidden.append(out))
        try:
            answer = self.model(inputs.input_ids, **self.padding(inputs))
        finally:
            handle.remove()
        return {"last_hidden_state": hidden[0], **self.head_outputs(answer)}

    def head_outputs(self, answer: Any) -> dict[str, torch.Tensor]:
        """Return the head's answer by name: logits of every position."""
        return {"logits": answer}

    def padding(self, inputs: CaseInputs) -> dict[str, Any]:
        """Return the mask of a padded prompt; nothing for a whole one."""
        real = inputs.attention_mask.bool()
        # Rows of padding see all that is real: a row that sees nothing would turn into NaN.
        return {} if bool(real.all()) else {"mask": real[:, None, :].expand(-1, real.shape[1], -1)}


class VisionCalls(FmsCalls):
    """A vision encoder by itself, with the head that pools its output."""

    def vision(
        self, pixel_values: torch.Tensor, *, image_sizes: torch.Tensor | None = None
    ) -> Mapping[str, torch.Tensor]:
        """Return the last hidden state, (tiles, patches, width), and what is pooled of it."""
        features, pooled = self.model(pixel_values)
        return {"last_hidden_state": features, "pooler_output": pooled}


def additive_mask(seen: torch.Tensor, *, like: torch.Tensor) -> torch.Tensor:
    """Return 0 where a token is seen and minus infinity elsewhere, in the dtype of `like`."""
    return like.new_zeros(seen.shape).masked_fill(~seen, float("-inf"))


def cut_after_end(new: torch.Tensor, ends: Sequence[int]) -> torch.Tensor:
    """Return new tokens up to the first end token; FMS's loop knows a single one alone."""
    import torch

    places = torch.isin(new, torch.tensor(list(ends), device=new.device)).nonzero()
    return new[: int(places[0]) + 1] if len(places) else new


def cut_filled(new: torch.Tensor, end: int, *, filler: Sequence[int]) -> torch.Tensor:
    """Return a row of a batch up to its end token, where nothing but filler stands after it.

    A row that goes on after its end is returned whole: the model was told what ends it.
    """
    import torch

    cut = cut_after_end(new, [end])
    rest = new[len(cut) :]
    filled = torch.isin(rest, torch.tensor([end, *filler], device=new.device))
    return cut if bool(filled.all()) else new


def join_rows(rows: Sequence[CaseInputs]) -> CaseInputs:
    """Return prompts of one length as one batch; the tiles of all rows follow each other."""
    import torch

    pixels = [row.pixel_values for row in rows if row.pixel_values is not None]
    return CaseInputs(
        torch.cat([row.input_ids for row in rows]),
        torch.cat([row.attention_mask for row in rows]),
        torch.cat(pixels) if pixels else None,
    )
