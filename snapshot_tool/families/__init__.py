"""Model families: what snap has to know of each, as data, for the reference and for FMS alike."""

from collections.abc import Mapping
from typing import Any

from snapshot_tool.core.errors import UsageError
from snapshot_tool.families.bamba import BAMBA
from snapshot_tool.families.bert import BERT, BERT_CLASSIFICATION
from snapshot_tool.families.family import Family
from snapshot_tool.families.gpt_bigcode import GPT_BIGCODE
from snapshot_tool.families.gpt_oss import GPT_OSS
from snapshot_tool.families.granite import GRANITE
from snapshot_tool.families.granite_moe_hybrid import GRANITE_MOE_HYBRID
from snapshot_tool.families.granite_swa import GRANITE_SWA
from snapshot_tool.families.idefics3 import IDEFICS3
from snapshot_tool.families.llama import LLAMA
from snapshot_tool.families.llava_next import LLAVA_NEXT
from snapshot_tool.families.ministral3 import MINISTRAL3
from snapshot_tool.families.mistral import MISTRAL
from snapshot_tool.families.mistral3 import MISTRAL3
from snapshot_tool.families.mixtral import MIXTRAL
from snapshot_tool.families.mpnet import MPNET
from snapshot_tool.families.qwen3 import QWEN3
from snapshot_tool.families.roberta import (
    ROBERTA,
    ROBERTA_CLASSIFICATION,
    ROBERTA_QUESTION_ANSWERING,
)
from snapshot_tool.families.siglip_vision import SIGLIP_VISION

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        IDEFICS3,
        LLAMA,
        GRANITE,
        GRANITE_MOE_HYBRID,
        GRANITE_SWA,
        MISTRAL,
        MIXTRAL,
        QWEN3,
        GPT_BIGCODE,
        GPT_OSS,
        BAMBA,
        ROBERTA,
        ROBERTA_CLASSIFICATION,
        ROBERTA_QUESTION_ANSWERING,
        BERT,
        BERT_CLASSIFICATION,
        MPNET,
        SIGLIP_VISION,
        LLAVA_NEXT,
        MISTRAL3,
        MINISTRAL3,
    )
}


def family_of(name: str) -> Family:
    """Return the family that a golden set names; raise UsageError for an unknown one."""
    if name not in FAMILIES:
        raise _unknown(f"family {name!r}")
    return FAMILIES[name]


def family_of_config(config: Mapping[str, Any]) -> Family:
    """Return the family of a config.json, by its class; raise UsageError for an unknown one."""
    # A golden set's configuration may be a stranger's: anything may stand anywhere.
    named = config.get("architectures")
    classes = named if isinstance(named, list) else []
    text = config.get("text_config")
    text_type = text.get("model_type") if isinstance(text, Mapping) else None
    for family in FAMILIES.values():
        fits = not family.language_model or text_type == family.language_model
        if family.hf_class in classes and fits:
            return family
    model_type = f"model_type {str(config.get('model_type'))!r}"
    raise _unknown(f"{model_type} with architectures {classes}" if classes else model_type)


def _unknown(what: str) -> UsageError:
    return UsageError(
        f"{what} is not supported (supported: {', '.join(FAMILIES)})",
        "choose a checkpoint of a supported family",
    )
