"""The declaration of a family: the reference's side of a model, and FMS's."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from snapshot_tool.base.phases import Phase
from snapshot_tool.base.protocol import Side
from snapshot_tool.families.fms_calls import FmsCalls

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

Config = Mapping[str, Any]  # as Hugging Face has it
Fields = dict[str, Any]  # of FMS's configuration, nested as FMS nests them


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


# Keys of an environment: the file that declares a family, and what a golden set has of it.
FILE, ANSWERS = "family_file", "family_answers"
# Key and value in the environment of a model without a declaration, if padding changes no logits.
PADDING, UNSEEN = "padding", "changes nothing"
# The page on declaring a family.
PAGE = "docs/adding-a-family.md"


@dataclass(frozen=True, slots=True)
class Capture:
    """One tensor of the reference's forward pass that a golden set keeps whole.

    Args:
        phase: the phase that it belongs to.
        name: its name in the golden set.
        module: the Hugging Face module that it is seen at.
        side: whether it is that module's first input or its (first) output.
        formerly: the module's name in older releases of transformers, if it has another.
        judged: whether a candidate must return it, too; what is not is kept to be looked at.
    """

    phase: Phase
    name: str
    module: str
    side: Side
    formerly: str = ""
    judged: bool = True


@dataclass(frozen=True, slots=True)
class ModulePair:
    """Which Hugging Face module an FMS module corresponds to.

    Args:
        fms: pattern of the FMS module's whole name.
        hf: the other's name, with the pattern's groups.
        part: which part of the FMS module's output it is, if FMS fuses several into one: an
            index into a tuple, or into `parts` equal pieces of the last dimension.
        parts: into how many pieces a fused tensor is cut.
        rotary: whether FMS orders the elements of each head for interleaved rotary embedding,
            where Hugging Face keeps both halves apart.
    """

    fms: str
    hf: str
    part: int | None = None
    parts: int = 1
    rotary: bool = False


def pairs_of(name: str, pairs: Sequence[ModulePair]) -> list[tuple[str, ModulePair]]:
    """Return the Hugging Face modules that an FMS module corresponds to, with their pairs."""
    matches = ((re.fullmatch(pair.fms, name), pair) for pair in pairs)
    return [(match.expand(pair.hf), pair) for match, pair in matches if match]


# Checkpoint keys of buffers that some files hold.
NOT_WEIGHTS = (r"rotary_emb\.inv_freq$", r"position_ids$")


@dataclass(frozen=True, slots=True)
class FmsPort:
    """How FMS has a family.

    Args:
        architecture: its name in FMS's registry.
        config: from Hugging Face's configuration to FMS's fields, nested as FMS nests them.
        calls: how FMS's model is called, phase by phase.
        module_pairs: how modules are named on both sides.
        absent: what FMS computes with if its configuration has no such field, as in releases from
            before it: a value, or a function of the fields beside it. Nested fields by their own
            names.
        not_weights: patterns of checkpoint keys that are no weights (buffers that some files hold).
        tied: pattern of the head's key. If the configuration ties it to the embedding, Hugging Face
            ignores what a checkpoint holds under it.
        encoder: the module that encodes images within FMS's model; "" if there is none.
        tiles_apart: whether the encoder takes tiles (tiles, channels, height, width) that know
            nothing of each other.
    """

    architecture: str
    config: Callable[[Config], Fields]
    calls: type[FmsCalls]
    module_pairs: tuple[ModulePair, ...] = ()
    absent: Mapping[str, Any] = field(default_factory=dict)
    not_weights: tuple[str, ...] = NOT_WEIGHTS
    tied: str = r"^lm_head\.weight$"
    encoder: str = ""
    tiles_apart: bool = False

    def is_weight(self, key: str, config: Config) -> bool:
        """Return whether the reference holds a checkpoint's tensor after loading, by its key."""
        tied = text_config(config).get("tie_word_embeddings")
        ignored = [*self.not_weights, *([self.tied] if tied else [])]
        return not any(re.search(pattern, key) for pattern in ignored)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of Hugging Face's configuration that the text model has, or all of it."""
    text = config.get("text_config")
    return text if isinstance(text, Mapping) and text else config


def computed_without(absent: Mapping[str, Any], name: str, fields: Mapping[str, Any]) -> Any:
    """Return what FMS computes with if it has no such field, or None; see FmsPort.absent."""
    value = absent.get(name)
    return value(fields) if callable(value) else value


NO_PORT = FmsPort("", lambda _config: {}, FmsCalls)


@dataclass(frozen=True, slots=True)
class Family:
    """One model family.

    Args:
        name: what golden sets call it.
        hf_class: the transformers class that a checkpoint's config.json names, and that loads it.
        phases: the phases that it has. Without forward it takes no text, without vision no images.
        fms: how FMS has it; by default FMS has not, and another candidate is checked.
        captures: what is kept of a forward pass besides the logits.
        compared: for vision and connector, the name of the tensor that a candidate must return, or
            return among others by name: what else is captured of a phase is compared as well.
        logits: whether forward gives logits of every position over the vocabulary.
        pixel_dims: dimensions of the pixel values that Hugging Face's forward takes: 4 for (tiles,
            channels, height, width), 5 for a batch of them.
        reserved_positions: position embeddings that no token can have.
        attention: the implementation of attention that Hugging Face is asked for; "" for its own
            choice.
        tile_id_field: the field of Hugging Face's configuration with the id that stands in a
            prompt for each token that the connector makes of a tile, tile after tile; "" where
            prompts cannot be cut between tiles.
        recurrent: whether it has layers whose state padding enters: what was recorded with padding
            then holds for that padding alone. Where there is no declaration, recording tries it.
        language_model: `model_type` of the text model, if one class serves several families.
        digest: SHA-256 of the user's file that declares it, set on loading; "" for snap's own.
    """

    name: str
    hf_class: str
    phases: tuple[Phase, ...]
    fms: FmsPort = NO_PORT
    captures: tuple[Capture, ...] = ()
    compared: Mapping[Phase, str] = field(default_factory=dict)
    logits: bool = True
    pixel_dims: int = 4
    reserved_positions: int = 0
    attention: str = "sdpa"
    tile_id_field: str = ""
    recurrent: bool = False
    language_model: str = ""
    digest: str = ""

    @property
    def environment(self) -> dict[str, str]:
        """What a golden set and a report say of a declaration that is not snap's own."""
        return {FILE: self.digest, ANSWERS: self.answers} if self.digest else {}

    @property
    def answers(self) -> str:
        """What a golden set holds of it, on one line."""
        kept = [
            f"{c.phase} {c.name} ({c.module} {c.side}{'' if c.judged else ', not judged'})"
            for c in self.captures
        ]
        compared = [f"{phase} compares {name}" for phase, name in self.compared.items()]
        return "; ".join([*self.phases, *["logits"] * self.logits, *kept, *compared])

    @property
    def is_declared(self) -> bool:
        """Whether there is a declaration, or nothing but the name of a class."""
        return self.name != self.hf_class

    @property
    def takes_text(self) -> bool:
        """Whether its inputs have a prompt."""
        return Phase.FORWARD in self.phases

    @property
    def takes_images(self) -> bool:
        """Whether its inputs may have images."""
        return Phase.VISION in self.phases

    @property
    def generates(self) -> bool:
        """Whether it is a decoder, which positions are counted for from the first real token."""
        return Phase.GENERATE in self.phases

    @property
    def whole_outputs(self) -> tuple[str, ...]:
        """The tensors besides logits that its forward gives, compared whole."""
        return self.judged_outputs(Phase.FORWARD)

    def judged_outputs(self, phase: Phase) -> tuple[str, ...]:
        """Return the tensors that are captured of a phase and that a candidate must return."""
        return tuple(c.name for c in self.captures if c.phase is phase and c.judged)
