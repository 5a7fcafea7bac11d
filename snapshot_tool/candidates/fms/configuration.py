"""The configuration that FMS computes with, beside Hugging Face's and snap's mapping of it."""

from __future__ import annotations

import re
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from snapshot_tool.base.errors import CandidateUnavailable, describe_error
from snapshot_tool.base.protocol import CandidateRequest, FieldDifference
from snapshot_tool.families.family import PAGE, Config, Family, FmsPort

# Names, ids, training, caching and generation: no forward pass depends on them.
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
# FMS's fields without an effect on numbers if the weights fit: widths are rounded up to
# multiple_of, tables of positions may be longer or shorter, the padding token's row comes from the
# checkpoint.
_HARMLESS_IN_FMS = {"multiple_of", "max_expected_seq_len", "max_pos", "pad_id", "p_dropout"}


class _ReadConfig(UserDict[str, Any]):
    """A configuration that notes the dotted names of the fields that are read."""

    def __init__(self, config: Config, read: set[str], path: str = "") -> None:
        super().__init__(config)
        self._read, self._path = read, path

    def __getitem__(self, name: str) -> Any:
        self._read.add(f"{self._path}{name}")
        value = super().__getitem__(name)
        if isinstance(value, Mapping) and name.endswith("_config"):
            return _ReadConfig(value, self._read, f"{self._path}{name}.")
        return value


def unmapped_fields(family: Family, request: CandidateRequest) -> list[str]:
    """Return one line on the fields that may change an output and that FMS does not get, or none.

    These are not at the default of Hugging Face's class, and the family's mapping does not read
    them.
    """
    read: set[str] = set()
    family.fms.config(_ReadConfig(request.config, read))
    fields = [
        f"{name}={_field(request.config, name)}"
        for name in request.changed_fields
        if name not in read and not _HARMLESS.fullmatch(name.rpartition(".")[2])
    ]
    return [f"fields that FMS is not given: {', '.join(fields)}"] if fields else []


def fields_of_shape(config: Config, expected: Sequence[int], actual: Sequence[int]) -> str:
    """Return the fields that give the sizes by which two shapes differ, as "; config.json has …".

    A size is a field's value, or the product of a head's size and a number of heads. Return "" if
    there are none.
    """
    sizes = {e for e, a in zip(expected, actual, strict=False) if e != a}
    numbers = {
        name: value
        for name, value in whole_numbers(config)
        if all(part.endswith("_config") for part in name.split(".")[:-1])
    }
    found = [name for name, value in numbers.items() if value in sizes]
    if not found:
        heads = [v for n, v in numbers.items() if n.endswith(("_heads", "n_head"))]
        found = [
            name
            for name, value in numbers.items()
            if name.endswith("head_dim") and any(value * count in sizes for count in heads)
        ]
    fields = ", ".join(f"{name}={numbers[name]}" for name in found)
    return f"; config.json has {fields}" if fields else ""


def whole_numbers(value: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """Yield the whole numbers of a configuration, by their dotted names."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from whole_numbers(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, int) and not isinstance(value, bool):
        yield name, value


def require_taken(port: FmsPort, fields: Config, config: Any, path: str) -> None:
    """Raise CandidateUnavailable unless FMS's configuration holds every field.

    FMS ignores unknown ones silently. path: the configuration's name in errors.
    """
    for name, value in fields.items():
        if not hasattr(config, name):
            if name in port.absent and value == port.computed_without(name, fields):
                continue
            raise CandidateUnavailable(
                f"FMS's {path} configuration has no field {name}, which is {value!r} here",
                f"check an FMS that has it, or declare the family otherwise: {PAGE}",
            )
        actual = getattr(config, name)
        if isinstance(value, dict) and name.endswith("_config"):
            require_taken(port, value, actual, f"{path}.{name}")
        elif actual != value:
            raise CandidateUnavailable(
                f"FMS's {path} configuration took {name}={actual}, not {value} from the checkpoint"
            )


def compare_mappings(family: Family, request: CandidateRequest) -> tuple[FieldDifference, ...]:
    """Return the fields that FMS's own mapping fills differently from snap's.

    FMS maps Hugging Face's configuration in get_model("hf_pretrained") and imports transformers for
    it. Raises CandidateUnavailable without transformers, and if FMS's mapping raises.
    """
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
    except Exception:  # the mapping makes no sense: its fields are compared as they are
        config = own
    return tuple(_differences(family.fms, request.config, config))


def _differences(port: FmsPort, hf_config: Config, own: Any) -> Iterator[FieldDifference]:
    """Yield the fields of `own`, FMS's configuration, that snap's mapping fills differently."""
    for name, expected, beside in _leaves(port.config(hf_config)):
        last = name.rpartition(".")[2]
        actual = _field(own, name, otherwise=port.computed_without(last, beside))
        off = all(value is None or value is False or value == {} for value in (actual, expected))
        if actual == expected or off or _is_same_activation(actual, expected):
            continue
        sources = tuple(_sources(port.config, hf_config, name))
        yield FieldDifference(
            name, str(actual), str(expected), sources, harmless=last in _HARMLESS_IN_FMS
        )


def _leaves(fields: Config, path: str = "") -> Iterator[tuple[str, Any, Config]]:
    """Yield the dotted name of each field, its value and the fields beside it."""
    for name, value in fields.items():
        if isinstance(value, Mapping) and name.endswith("_config"):
            yield from _leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value, fields


def _field(config: Any, name: str, *, otherwise: Any = None) -> Any:
    """Return a field of a configuration, an object or a mapping; `otherwise` if it has none."""
    for part in name.split("."):
        fields = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
        if part not in fields:
            return otherwise
        config = fields[part]
    return config


def _is_same_activation(actual: Any, expected: Any) -> bool:
    """Return whether two values are names of one activation: FMS has several for some."""
    from fms.utils.activation import str_to_activation

    try:
        return type(str_to_activation(actual)) is type(str_to_activation(expected))
    except Exception:  # a value that is not an activation
        return False


def _sources(mapping: Callable[[Config], Config], config: Config, name: str) -> Iterator[str]:
    """Yield the fields of Hugging Face's configuration that change a field of FMS's."""
    own = _field(mapping(config), name)
    for source, changed in _changed_configs(config):
        try:
            if _field(mapping(changed), name) != own:
                yield source
        except Exception:  # noqa: S112 - a value that makes no sense
            continue


def _changed_configs(config: Config) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield configurations that differ from this one in one field, with its dotted name."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            for inner, changed in _changed_configs(value):
                yield f"{name}.{inner}", {**config, name: changed}
        elif isinstance(value, bool):
            yield name, {**config, name: not value}
        elif isinstance(value, list):
            yield name, {**config, name: value * 2}
        elif isinstance(value, str):
            yield name, {**config, name: f"{value}'"}
        elif isinstance(value, int | float):
            yield name, {**config, name: value * 2 + 1}
