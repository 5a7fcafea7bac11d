"""Faults in the generation loop and its cache: a forward pass of the prompt is right with them."""

from tests.mutants.mutant import DERIVED, Edit, Mutant
from tests.mutants.mutant import GENERATION as PLACE

_IDEFICS3 = "fms/models/idefics3_components/fms_model.py"
_LOOP = "fms/utils/generation.py"
_ATTENTION = "fms/modules/attention.py"
_KWARGS = "extra_kwargs=self._attention_kwargs(attention_mask),"
_PIXELS = "pixels = pixel_values if iteration == 0 else None"


def _mutant(name: str, what: str, old: str, new: str, *, file: str = _LOOP) -> Mutant:
    return Mutant(name, what, "generate", PLACE, Edit(file, old, new))


def _derived(name: str, what: str, old: str, new: str) -> Mutant:
    """Return a fault that only derived questions show."""
    return Mutant(name, what, DERIVED, "generation-batch", Edit(_IDEFICS3, old, new))


GENERATION = (
    _mutant(
        "cache-position-one-early",
        "a new token's position is one too low",
        "        if self.partial_rope != 1.0:\n            q_rope",
        "        if past_kv_state is not None and past_kv_state[0] is not None:\n"
        "            position_ids = position_ids - 1\n"
        "        if self.partial_rope != 1.0:\n            q_rope",
        file="fms/modules/positions.py",
    ),
    _mutant(
        "padded-position-stays",
        "a new token keeps the last one's position",
        "position_ids = position_ids[:, -1:] + 1",
        "position_ids = position_ids[:, -1:]",
    ),
    _mutant(
        "padded-mask-hides-new-token",
        "a new token does not attend to itself",
        "torch.zeros(mask.size(0), 1, 1, device=mask.device)",
        "torch.full((mask.size(0), 1, 1), -torch.inf, device=mask.device)",
        file=_ATTENTION,
    ),
    _mutant(
        "padding-not-passed",
        "generation is not told of padding",
        _KWARGS,
        "extra_kwargs=self._attention_kwargs(torch.ones_like(input_ids)),",
        file=_IDEFICS3,
    ),
    _mutant(
        "padding-on-the-other-side",
        "generation takes the padding to be on the right",
        _KWARGS,
        "extra_kwargs=self._attention_kwargs(attention_mask.flip(-1)),",
        file=_IDEFICS3,
    ),
    _mutant(
        "cache-not-kept",
        "each step sees the last token alone",
        '            kwargs["past_key_value_states"] = past_key_value_states\n',
        "",
    ),
    _mutant(
        "cache-not-extended",
        "each step sees the prompt and its own token alone",
        "            key_cache_result,\n            value_cache_result,\n        )\n    else:",
        "            key_cache,\n            value_cache,\n        )\n    else:",
        file=_ATTENTION,
    ),
    _mutant(
        "cache-keys-and-values-swapped",
        "keys and values change places in the cache",
        "return out, (keys_return, values_return)",
        "return out, (values_return, keys_return)",
        file=_ATTENTION,
    ),
    _mutant(
        "cache-in-bfloat16",
        "cached keys are rounded to bfloat16",
        "return out, (keys_return, values_return)",
        "return out, (keys_return.bfloat16().to(keys.dtype), values_return)",
        file=_ATTENTION,
    ),
    _mutant(
        "first-position-chosen",
        "the next token is chosen at the first position",
        "logits = logits[:, -1, :]",
        "logits = logits[:, 0, :]",
    ),
    _mutant(
        "sampled",
        "tokens are sampled",
        "do_sample=False,",
        "do_sample=True,",
        file=_IDEFICS3,
    ),
    _mutant(
        "one-token-short",
        "one token less than asked for",
        "for i in range(max_new_tokens):",
        "for i in range(max_new_tokens - 1):",
    ),
    _mutant(
        "end-token-ignored",
        "generation goes on after the end token",
        "stop = ends[0] if len(ends) == 1 and len(input_ids) == 1 else None",
        "stop = ends = None",
        file=_IDEFICS3,
    ),
    _mutant(
        "end-token-cut",
        "the end token is cut off",
        "after = ended.cumsum(-1) - ended.int() > 0",
        "after = ended.cumsum(-1) > 0",
        file=_IDEFICS3,
    ),
    _mutant(
        "images-never-embedded",
        "generation does not see the images",
        _PIXELS,
        "pixels = None",
        file=_IDEFICS3,
    ),
    _mutant(
        "images-in-every-step",
        "every step looks for the images' places, in the prompt",
        _PIXELS,
        "pixels, ids = pixel_values, ids if pixel_values is None else input_ids",
        file=_IDEFICS3,
    ),
    _mutant(
        "context-cut-at-128",
        "prompts are cut to their last 128 tokens",
        "max_seq_len=self.config.text_config.max_expected_seq_len,\n            max_new_tokens",
        "max_seq_len=128,\n            max_new_tokens",
        file=_IDEFICS3,
    ),
    _derived(
        "batch-stops-with-first-row",
        "a batch stops where its first row ends",
        "stop = ends[0] if len(ends) == 1 and len(input_ids) == 1 else None",
        "stop = ends[0] if len(ends) == 1 else None",
    ),
    _derived(
        "batch-ends-with-first-row",
        "a batch is cut where its first row ends",
        "longest = int((~after).sum(-1).max())",
        "longest = int((~after).sum(-1).min())",
    ),
    _derived(
        "batch-rows-not-ended",
        "rows of a batch go on after their end token",
        "        new = torch.where(after, ends[0], new)\n",
        "",
    ),
)
