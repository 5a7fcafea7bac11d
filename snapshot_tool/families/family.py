"""The declaration that every family fills in."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from snapshot_tool.core.phases import Phase
from snapshot_tool.core.taps import Side


@dataclass(frozen=True, slots=True)
class Capture:
    """One tensor of the reference's forward pass that a golden set keeps whole.

    Args:
        phase: the phase that it belongs to.
        name: its name in the golden set.
        module: the Hugging Face module that it is seen at.
        side: whether it is that module's first input or its (first) output.
    """

    phase: Phase
    name: str
    module: str
    side: Side


@dataclass(frozen=True, slots=True)
class Twin:
    """Which Hugging Face module an FMS module corresponds to.

    Args:
        fms: pattern of the FMS module's whole name.
        hf: the other's name, with the pattern's groups.
        part: which part of the FMS module's output it is, where FMS fuses several into one: an
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


@dataclass(frozen=True, slots=True)
class Family:
    """One model family.

    Args:
        name: `model_type` in config.json.
        phases: the phases that it has.
        auto_class: the transformers class that loads it.
        captures: what is kept of a forward pass besides the logits.
        compared: for vision and connector, the name of the tensor that a candidate must reproduce.
        fms_architecture: its name in FMS's registry.
        fms_config_class: the class of its configuration in FMS's module.
        fms_config: from Hugging Face's configuration to FMS's, nested as FMS nests it.
        fms_aliases: other names that an FMS branch may use for a field of its configuration.
        fms_twins: how modules are named on both sides.
        tile_id_field: the field of Hugging Face's configuration with the id that stands in a
            prompt for each token that the connector makes of a tile, tile after tile; "" where
            prompts cannot be cut between tiles.
        not_weights: patterns of checkpoint keys that are no weights (buffers that some files hold).
    """

    name: str
    phases: tuple[Phase, ...]
    auto_class: str
    captures: tuple[Capture, ...]
    compared: Mapping[Phase, str]
    fms_architecture: str
    fms_config_class: str
    fms_config: Callable[[Mapping[str, Any]], dict[str, Any]]
    fms_aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fms_twins: tuple[Twin, ...] = ()
    tile_id_field: str = ""
    not_weights: tuple[str, ...] = ()
