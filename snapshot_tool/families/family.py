"""The declaration of a family: the reference's side of a model, and FMS's."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from snapshot_tool.base.protocol import Phase, Side
from snapshot_tool.families.fms_calls import FmsCalls

Config = Mapping[str, Any]  # Hugging Face's
Fields = dict[str, Any]  # of FMS's configuration, nested as FMS nests them

# Keys of an environment: the digest of the file that declares a family, and the recorded outputs.
FILE, ANSWERS = "family_file", "family_answers"
# Key and value in the environment of a model without a declaration, if padding changes no logits.
PADDING, UNSEEN = "padding", "changes nothing"
# The page on declaring a family.
PAGE = "docs/adding-a-family.md"
# Checkpoint keys of buffers that some files hold.
NOT_WEIGHTS = (r"rotary_emb\.inv_freq$", r"position_ids$")


@dataclass(frozen=True, slots=True)
class Capture:
    """One tensor of the reference's forward pass that a golden set keeps whole.

    Args:
        phase: the phase that it belongs to.
        name: its name in the golden set.
        module: the Hugging Face module that it is seen at.
        side: whether it is that module's first input or its (first) output.
        formerly: the module's name in older releases of transformers, if it has another.
        judged: whether a candidate must return it, too; if not, it is kept for inspection.
    """

    phase: Phase
    name: str
    module: str
    side: Side
    formerly: str = ""
    judged: bool = True


@dataclass(frozen=True, slots=True)
class ModulePair:
    """The Hugging Face module that an FMS module corresponds to.

    Args:
        fms: pattern of the FMS module's whole name.
        hf: the Hugging Face module's name, with the pattern's groups.
        part: the part of the FMS module's output, if FMS fuses several modules into one: an index
            into a tuple, or into `parts` equal pieces of the last dimension.
        parts: into how many pieces a fused tensor is cut.
        rotary: whether FMS orders the elements of each head for interleaved rotary embedding,
            while Hugging Face keeps both halves apart.
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


def pairs_below(fms: str, hf: str, names: Mapping[str, str]) -> tuple[ModulePair, ...]:
    """Return the pairs of modules below two modules, FMS's names first; "" is the module itself.

    fms: pattern of FMS's module. hf: Hugging Face's, with the pattern's groups.
    """
    return tuple(
        ModulePair(rf"{fms}\.{re.escape(own)}" if own else fms, f"{hf}.{other}" if other else hf)
        for own, other in names.items()
    )


def fused_pairs(fms: str, hf: str, *names: str, parts: int = 1) -> tuple[ModulePair, ...]:
    """Return the pairs of an FMS module that computes several modules below `hf`, in this order."""
    return tuple(ModulePair(fms, f"{hf}.{name}", part, parts) for part, name in enumerate(names))


def renamed(config: Config, *same: str, **names: str) -> Fields:
    """Return fields that FMS only names differently, and those that it names the same.

    names: Hugging Face's name of each, by FMS's.
    """
    return {fms: config[hf] for fms, hf in {**{name: name for name in same}, **names}.items()}


@dataclass(frozen=True, slots=True)
class FmsPort:
    """How FMS implements a family.

    Args:
        architecture: its name in FMS's registry.
        config: from Hugging Face's configuration to FMS's fields, nested as FMS nests them.
        calls: how FMS's model is called, phase by phase.
        module_pairs: how modules are named on both sides.
        absent: by field, what FMS computes with if its configuration lacks it, as in older
            releases: a value, or a function of the fields beside it. Nested fields have only their
            own names here.
        not_weights: patterns of checkpoint keys that are not weights, but buffers.
        tied: pattern of the head's key. If the configuration ties it to the embedding, Hugging Face
            ignores what a checkpoint holds under it.
        encoder: the module that encodes images within FMS's model; "" if there is none.
        tiles_apart: whether the encoder takes tiles (tiles, channels, height, width) and computes
            each by itself.
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

    def computed_without(self, name: str, fields: Mapping[str, Any]) -> Any:
        """Return what FMS computes with if it has no such field, or None; see `absent`.

        fields: those beside it.
        """
        value = self.absent.get(name)
        return value(fields) if callable(value) else value


def text_config(config: Config) -> Config:
    """Return the part of Hugging Face's configuration that the text model has, or all of it."""
    text = config.get("text_config")
    return text if isinstance(text, Mapping) and text else config


NO_PORT = FmsPort("", lambda _config: {}, FmsCalls)


@dataclass(frozen=True, slots=True)
class Family:
    """One model family.

    Args:
        name: its name in golden sets.
        hf_class: the transformers class that a checkpoint's config.json names, and that loads it.
        phases: the phases that it has. Without forward it takes no text, without vision no images.
        fms: how FMS implements it; by default it does not, and another candidate is checked.
        captures: what is kept of a forward pass besides the logits.
        compared: for vision and connector, the name of the tensor that a candidate must return,
            alone or among others by name. Whatever else is captured of a phase is compared as well.
        logits: whether forward returns logits of every position over the vocabulary.
        pixel_dims: dimensions of the pixel values that Hugging Face's forward takes: 4 for (tiles,
            channels, height, width), 5 for a batch of them.
        reserved_positions: position embeddings that no token can have.
        attention: the implementation of attention that Hugging Face runs; "" for its own choice.
        tile_id_field: the field of Hugging Face's configuration with the id of the placeholder: a
            prompt has one for each token that the connector makes of a tile, tile after tile. "" if
            prompts cannot be cut between tiles.
        recurrent: whether padding enters the state of some layers. What was recorded with padding
            then holds for that padding alone. Without a declaration, recording finds out.
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
        """What a golden set and a report say about a declaration that is not snap's own."""
        return {FILE: self.digest, ANSWERS: self.answers} if self.digest else {}

    @property
    def answers(self) -> str:
        """The outputs that a golden set keeps, on one line."""
        kept = [
            f"{c.phase} {c.name} ({c.module} {c.side}{'' if c.judged else ', not judged'})"
            for c in self.captures
        ]
        compared = [f"{phase} compares {name}" for phase, name in self.compared.items()]
        return "; ".join([*self.phases, *["logits"] * self.logits, *kept, *compared])

    @property
    def is_declared(self) -> bool:
        """Whether there is a declaration, not only the name of a class."""
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
        """Whether it is a decoder, whose positions are counted from the first real token."""
        return Phase.GENERATE in self.phases

    @property
    def whole_outputs(self) -> tuple[str, ...]:
        """The tensors besides logits that its forward returns, compared whole."""
        return self.judged_outputs(Phase.FORWARD)

    def judged_outputs(self, phase: Phase) -> tuple[str, ...]:
        """Return the tensors that are captured of a phase and that a candidate must return."""
        return tuple(c.name for c in self.captures if c.phase is phase and c.judged)
