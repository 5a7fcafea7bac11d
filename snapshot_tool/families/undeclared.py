"""The family of a `…ForCausalLM` without a declaration, from its class and its configuration.

The name of such a family is the class, so a golden set that names it needs no declaration.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from snapshot_tool.base.errors import CandidateUnavailable
from snapshot_tool.families.family import NO_PORT, PAGE, Family, FmsPort
from snapshot_tool.families.fms_calls import DecoderCalls, LoadedFms
from snapshot_tool.families.llama import (
    DECODER_PHASES,
    decoder_config,
    head_dim,
    rope_scaling,
    rope_theta,
)

_CLASS = re.compile(r"[A-Za-z0-9_]+ForCausalLM")
# Without them FMS builds a model of another size.
_SIZES = ("src_vocab_size", "emb_dim", "nheads", "nlayers")


def undeclared_family(hf_class: object, config: Mapping[str, Any] | None = None) -> Family | None:
    """Return the family of a class by its name; None unless it is a `…ForCausalLM`.

    config: Hugging Face's, which names the architecture that FMS may have.
    """
    if not isinstance(hf_class, str) or not _CLASS.fullmatch(hf_class):
        return None
    return Family(
        name=hf_class,
        hf_class=hf_class,
        phases=DECODER_PHASES,
        fms=NO_PORT if config is None else _port(config),
        attention="",
        # Unless recording finds that it is not.
        recurrent=True,
    )


class UndeclaredCalls(DecoderCalls):
    """A decoder whose configuration was filled in by names."""

    def __init__(self, loaded: LoadedFms) -> None:
        super().__init__(loaded)
        given = undeclared_config(loaded.config)
        own = [f.name for f in dataclasses.fields(loaded.model.config) if f.name not in given]
        self.notes.setdefault(
            "no family declares it: its FMS configuration is filled in by the names of fields, and "
            f"keeps its own {', '.join(own) or 'of none'}"
        )


def _port(config: Mapping[str, Any]) -> FmsPort:
    """Return a port to the architecture that is called like the model type, Llama-like.

    A port may lack a field and have its value built in: the numbers judge that. The sizes it needs.
    """
    try:
        fields = undeclared_config(config)
    except Exception:  # it may be a stranger's, and is refused later
        fields = {}
    return FmsPort(
        str(config.get("model_type")),
        undeclared_config,
        UndeclaredCalls,
        absent={name: value for name, value in fields.items() if name not in _SIZES},
    )


def undeclared_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a Llama-like configuration, and Hugging Face's own by their names."""
    same = {name: value for name, value in config.items() if value is not None}
    try:
        fields = {**same, **decoder_config(config), "head_dim": head_dim(config), "pad_id": -1}
        if "rope_theta" in same or "rope_parameters" in same:
            fields |= {"rope_theta": rope_theta(config), "rope_scaling": rope_scaling(config)}
    except KeyError as missing:
        raise CandidateUnavailable(
            f"the configuration of {config.get('model_type')} has no {missing.args[0]}, which "
            "Llama's has: it takes a declaration to fill in FMS's",
            f"declare the family in a file of your own: --family FILE.py ({PAGE})",
        ) from missing
    biases = {"attn_bias": "attention_bias", "mlp_bias": "mlp_bias"}
    return fields | {fms: config[hf] for fms, hf in biases.items() if hf in config}
