"""Granite with a sliding window in some layers, and attention sinks in all."""

from collections.abc import Mapping
from typing import Any

from snapshot_tool.families.family import Family, FmsPort
from snapshot_tool.families.fms_calls import DecoderCalls
from snapshot_tool.families.granite import granite_config
from snapshot_tool.families.llama import DECODER_PHASES, decoder_twins


def _fms_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of FMS's GraniteSWAConfig."""
    return {
        **granite_config(config),
        "window_length": config["sliding_window"],
        "is_swa_layer": [kind == "sliding_attention" for kind in config["layer_types"]],
    }


GRANITE_SWA = Family(
    name="granite_swa",
    hf_class="GraniteSWAForCausalLM",
    phases=DECODER_PHASES,
    attention="eager",
    fms=FmsPort("granite_swa", _fms_config, DecoderCalls, decoder_twins()),
)
