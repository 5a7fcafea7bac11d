"""Which fields of Hugging Face's configuration reach FMS, and which cannot change an answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

# Names, ids, training, caching and generation: nothing in a forward pass depends on them.
_HARMLESS = re.compile(
    r"""
    _name_or_path | architectures | auto_map | model_type | transformers_version | (torch_)?dtype
    | (bos|eos|pad|sep|cls|mask|unk|decoder_start|image|video|fake)_token_id | image_token_index
    | id2label | label2id | num_labels | problem_type | tokenizer_class | finetuning_task | prefix
    | .*dropout.* | .*_pdrop | layerdrop | initializer_.* | gradient_checkpointing
    | use_cache | cache_implementation | keys_to_ignore_at_inference | num_logits_to_keep
    | output_(attentions|hidden_states|scores|router_logits) | return_dict.* | torchscript
    | use_bfloat16 | pruned_heads | chunk_size_feed_forward | task_specific_params | pretraining_tp
    | router_(aux_loss_coef|jitter_noise) | image_seq_len(gth)? | _attn_implementation.*
    | attention_softmax_in_fp32 | scale_attention_softmax_in_fp32 | attn_implementation
    | (min|max)_length | max_new_tokens | do_sample | early_stopping | num_beams | num_beam_groups
    | diversity_penalty | temperature | top_k | top_p | typical_p | .*repetition_penalty
    | length_penalty | .*no_repeat_ngram_size | bad_words_ids | num_return_sequences
    | .*_eos_token_id | suppress_tokens | begin_suppress_tokens | exponential_decay_length_penalty
    | remove_invalid_values | is_(encoder_)?decoder | add_cross_attention | cross_attention_.*
    | tie_encoder_decoder | tf_legacy_loss
    """,
    re.VERBOSE,
)

Config = Mapping[str, Any]


class _ReadConfig(Mapping[str, Any]):
    """A configuration that notes which of its fields are read, by their dotted names."""

    def __init__(self, config: Config, read: set[str], path: str = "") -> None:
        self._config, self._read, self._path = config, read, path

    def __getitem__(self, name: str) -> Any:
        self._read.add(f"{self._path}{name}")
        value = self._config[name]
        if isinstance(value, Mapping) and name.endswith("_config"):
            return _ReadConfig(value, self._read, f"{self._path}{name}.")
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._config)

    def __len__(self) -> int:
        return len(self._config)


def fields_read(mapping: Callable[[Config], Config], config: Config) -> set[str]:
    """Return the dotted names of the fields that a mapping of a configuration reads."""
    read: set[str] = set()
    mapping(_ReadConfig(config, read))
    return read


def unmapped_fields(
    mapping: Callable[[Config], Config], config: Config, changed: tuple[str, ...]
) -> tuple[str, ...]:
    """Return fields that a mapping does not read, though they may change an answer.

    Each is "name=value", with a dotted name.

    changed: the fields that are not at the default of Hugging Face's class.
    """
    read = fields_read(mapping, config)
    return tuple(
        f"{name}={_value(config, name)}"
        for name in changed
        if name not in read and not _HARMLESS.fullmatch(name.rpartition(".")[2])
    )


def _value(config: Config, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def fields_of_shape(config: Config, expected: Sequence[int], actual: Sequence[int]) -> str:
    """Return the fields that give the sizes by which two shapes differ, as "name=value, …".

    A size is a field's value, or the product of a head's size and a number of heads.
    """
    sizes = {e for e, a in zip(expected, actual, strict=False) if e != a}
    numbers = {
        name: value
        for name, value in whole_numbers(config)
        if all(part.endswith("_config") for part in name.split(".")[:-1])
    }
    exact = [name for name, value in numbers.items() if value in sizes]
    if not exact:
        heads = {n: v for n, v in numbers.items() if n.endswith(("_heads", "n_head"))}
        exact = [
            name
            for name, value in numbers.items()
            if name.endswith("head_dim") and any(value * count in sizes for count in heads.values())
        ]
    return ", ".join(f"{name}={numbers[name]}" for name in exact)


def whole_numbers(value: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """Yield the whole numbers of a configuration, by their dotted names."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from whole_numbers(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, int) and not isinstance(value, bool):
        yield name, value
