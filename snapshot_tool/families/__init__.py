"""Model families: what snap has to know of each, as data, for the reference and for FMS alike.

A family of one's own is declared with what is exported here; see docs/adding-a-family.md.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from snapshot_tool.base.errors import FamilyInvalid, UsageError
from snapshot_tool.base.phases import Phase
from snapshot_tool.base.protocol import CaseInputs, Side
from snapshot_tool.families.bamba import BAMBA
from snapshot_tool.families.bert import BERT, BERT_CLASSIFICATION
from snapshot_tool.families.family import PAGE, Capture, Family, FmsPort, ModulePair
from snapshot_tool.families.fms_calls import (
    DecoderCalls,
    EncoderCalls,
    FmsCalls,
    ImageTextCalls,
    LoadedFms,
    VisionCalls,
)
from snapshot_tool.families.gpt_bigcode import GPT_BIGCODE
from snapshot_tool.families.gpt_oss import GPT_OSS
from snapshot_tool.families.granite import GRANITE
from snapshot_tool.families.granite_moe_hybrid import GRANITE_MOE_HYBRID
from snapshot_tool.families.granite_swa import GRANITE_SWA
from snapshot_tool.families.idefics3 import IDEFICS3
from snapshot_tool.families.llama import LLAMA, decoder_config, decoder_pairs
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
from snapshot_tool.families.undeclared import undeclared_family

__all__ = [
    "FAMILIES",
    "Capture",
    "CaseInputs",
    "DecoderCalls",
    "EncoderCalls",
    "Family",
    "FmsCalls",
    "FmsPort",
    "ImageTextCalls",
    "LoadedFms",
    "ModulePair",
    "Phase",
    "Side",
    "VisionCalls",
    "decoder_config",
    "decoder_pairs",
    "family_of",
    "family_of_config",
    "register",
    "register_later",
]

# Those that snap declares.
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


# Those that the user's files declare, and what runs these files: not before a family is looked up.
_OWN: dict[str, Family] = {}
_LOADERS: list[Callable[[], None]] = []

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def register(family: Family) -> None:
    """Add a family of the user's own to this process; it comes before snap's for its class.

    Raises FamilyInvalid for a declaration that cannot work, and for a name that snap's own has.
    """
    problem = _find_problem(family)
    if problem:
        raise FamilyInvalid(f"family {family.name!r}: {problem}", f"mend it; see {PAGE}")
    _OWN[family.name] = family


def forget_files() -> None:
    """Forget the families that files and entry points declared: they belong to one run."""
    _LOADERS.clear()
    for name in [name for name, family in _OWN.items() if family.digest]:
        del _OWN[name]


def register_later(loader: Callable[[], None]) -> None:
    """Keep what registers families until one is looked up.

    A check looks none up before golden set and checkpoint are verified: no code runs before.
    """
    _LOADERS.append(loader)


def family_of(name: str) -> Family:
    """Return the family that a golden set names; raise UsageError for an unknown one."""
    found = find_family(name)
    if found is None:
        raise _unknown(f"family {name!r}")
    return found


def find_family(name: str) -> Family | None:
    """Return the family of a name; None for an unknown one."""
    _load_own()
    return _OWN.get(name) or FAMILIES.get(name) or undeclared_family(name)


def family_of_config(config: Mapping[str, Any]) -> Family:
    """Return the family of a config.json, by its class; raise UsageError for an unknown one."""
    _load_own()
    # A golden set's configuration may be a stranger's: anything may stand anywhere.
    named = config.get("architectures")
    classes = named if isinstance(named, list) else []
    text = config.get("text_config")
    text_type = text.get("model_type") if isinstance(text, Mapping) else None
    for family in (*_OWN.values(), *FAMILIES.values()):
        fits = not family.language_model or text_type == family.language_model
        if family.hf_class in classes and fits:
            return family
    undeclared = undeclared_family(classes[0], config) if classes else None
    if undeclared is not None:
        return undeclared
    model_type = f"model_type {str(config.get('model_type'))!r}"
    raise _unknown(f"{model_type} with architectures {classes}" if classes else model_type)


def _load_own() -> None:
    while _LOADERS:
        _LOADERS.pop(0)()


def _find_problem(family: Family) -> str:
    """Return what keeps a declaration from working, or ""."""
    image_phases = {Phase.VISION, Phase.CONNECTOR} & set(family.phases)
    captured = {(capture.phase, capture.name) for capture in family.captures}
    problems = {
        "its name is not of letters, digits, '_', '.' and '-'": not _NAME.fullmatch(family.name),
        "its name is one of snap's own, or a class": family.name in (*FAMILIES, family.hf_class)
        or undeclared_family(family.name) is not None,
        "its phases have neither forward nor vision": not (
            family.takes_text or family.takes_images
        ),
        "`compared` does not name one capture for each of vision and connector that it has": not (
            family.compared.keys() == image_phases and set(family.compared.items()) <= captured
        ),
        "nothing of forward is compared, neither logits nor a capture": family.takes_text
        and not (family.logits or family.whole_outputs),
        "the FMS name of a module pair is not a pattern": not all(
            _is_pattern(pair.fms) for pair in family.fms.module_pairs
        ),
    }
    return next((text for text, holds in problems.items() if holds), "")


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def _unknown(what: str) -> UsageError:
    return UsageError(
        f"{what} is not supported",
        f"declare it in a file of your own and name that: --family FILE.py, see {PAGE}",
    )
