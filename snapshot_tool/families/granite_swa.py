"""Granite with a sliding window in some layers, and attention sinks in all."""

from snapshot_tool.families.family import Config, Fields
from snapshot_tool.families.granite import granite_config
from snapshot_tool.families.llama import decoder_family, decoder_pairs


def _fms_config(config: Config) -> Fields:
    """Return the fields of FMS's GraniteSWAConfig."""
    return {
        **granite_config(config),
        "window_length": config["sliding_window"],
        "is_swa_layer": [kind == "sliding_attention" for kind in config["layer_types"]],
    }


GRANITE_SWA = decoder_family(
    "granite_swa", "GraniteSWAForCausalLM", _fms_config, decoder_pairs(), attention="eager"
)
