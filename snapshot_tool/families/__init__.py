"""Model families as data, for the reference and for FMS alike.

A family of the user's own is declared with what is exported here; see docs/adding-a-family.md. It
is in a Python file or an installed package, whose code runs. So the user names it (`--family`); a
golden set names a family and never a file.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from snapshot_tool.base.errors import FamilyInvalid, UsageError
from snapshot_tool.base.protocol import CaseInputs, Phase, Side
from snapshot_tool.families.bamba import BAMBA
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
from snapshot_tool.families.idefics3 import IDEFICS3
from snapshot_tool.families.llama import (
    GPT_OSS,
    GRANITE,
    GRANITE_MOE_HYBRID,
    GRANITE_SWA,
    LLAMA,
    MISTRAL,
    MIXTRAL,
    QWEN3,
    decoder_config,
    decoder_pairs,
    undeclared_family,
)
from snapshot_tool.families.llava_next import LLAVA_NEXT
from snapshot_tool.families.mistral3 import MINISTRAL3, MISTRAL3
from snapshot_tool.families.roberta import (
    BERT,
    BERT_CLASSIFICATION,
    MPNET,
    ROBERTA,
    ROBERTA_CLASSIFICATION,
    ROBERTA_QUESTION_ANSWERING,
)
from snapshot_tool.families.siglip_vision import SIGLIP_VISION

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
    "name_families",
    "register",
]

ENTRY_POINTS = "snapshot_tool.families"

# Those that snap declares.
FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        *(IDEFICS3, LLAMA, GRANITE, GRANITE_MOE_HYBRID, GRANITE_SWA, MISTRAL, MIXTRAL, QWEN3),
        *(GPT_BIGCODE, GPT_OSS, BAMBA),
        *(ROBERTA, ROBERTA_CLASSIFICATION, ROBERTA_QUESTION_ANSWERING),
        *(BERT, BERT_CLASSIFICATION, MPNET),
        *(SIGLIP_VISION, LLAVA_NEXT, MISTRAL3, MINISTRAL3),
    )
}
# The user's own, by name.
_OWN: dict[str, Family] = {}
# Named and not yet run.
_NAMED: list[str] = []


def register(family: Family) -> None:
    """Add a family of the user's own to this process; it comes before snap's for its class.

    Raises FamilyInvalid for a declaration that cannot work, and for a name that snap's own has.
    """
    image_phases = {Phase.VISION, Phase.CONNECTOR} & set(family.phases)
    captured = {(capture.phase, capture.name) for capture in family.captures}
    names_outputs = family.compared.keys() == image_phases and (
        set(family.compared.items()) <= captured
    )
    is_taken = family.name in (*FAMILIES, family.hf_class) or undeclared_family(family.name)
    problem = ""
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", family.name):
        problem = "its name has other characters than letters, digits, '_', '.' and '-'"
    elif is_taken:
        problem = "its name is one of snap's own, or a class"
    elif not (family.takes_text or family.takes_images):
        problem = "its phases have neither forward nor vision"
    elif not names_outputs:
        problem = "`compared` does not name one capture for each of vision and connector"
    elif family.takes_text and not (family.logits or family.whole_outputs):
        problem = "nothing of forward is compared, neither logits nor a capture"
    for pair in family.fms.module_pairs:
        try:
            re.compile(pair.fms)
        except re.error as error:
            problem = f"the FMS name {pair.fms!r} of a module pair is not a pattern: {error}"
    if problem:
        raise FamilyInvalid(f"family {family.name!r}: {problem}", f"correct it; see {PAGE}")
    _OWN[family.name] = family


def name_families(names: Iterable[str]) -> None:
    """Take the values of `--family`, files or entry points; raise FamilyInvalid for others.

    Their code runs when a family is first looked up. A check looks none up before golden set and
    checkpoint are verified. What an earlier run in this process named is forgotten.
    """
    _NAMED.clear()
    for family in [family for family in _OWN.values() if family.digest]:
        del _OWN[family.name]
    for name in names:
        if name.endswith(".py"):
            if not Path(name).is_file():
                raise FamilyInvalid(f"--family {name} is not a file", f"see {PAGE}")
        else:
            _find_entry_point(name)
        _NAMED.append(name)


def _register_named() -> None:
    """Run the code that was named and not yet run; register the families that it declares."""
    while _NAMED:
        name = _NAMED.pop(0)
        try:
            if name.endswith(".py"):
                module = _run_file(Path(name))
            else:
                entry = _find_entry_point(name)
                entry.load()
                module = sys.modules[entry.module]
            digest = hashlib.sha256(Path(str(module.__file__)).read_bytes()).hexdigest()
        except Exception as error:  # the user's code may raise anything
            raise FamilyInvalid(
                f"--family {name} cannot be used: {type(error).__name__}: {error}", f"see {PAGE}"
            ) from error
        declared = [
            value
            for value in vars(module).values()
            if isinstance(value, Family) and not any(value is own for own in FAMILIES.values())
        ]
        if not declared:
            raise FamilyInvalid(f"--family {name} declares no Family", f"see {PAGE}")
        for family in declared:
            register(replace(family, digest=digest))


def _run_file(path: Path) -> ModuleType:
    """Run a file as a module under a name that no other module has."""
    name = f"snap_family_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _find_entry_point(name: str) -> importlib.metadata.EntryPoint:
    installed = importlib.metadata.entry_points(group=ENTRY_POINTS)
    if name not in installed.names:
        known = ", ".join([*sorted(installed.names), "FILE.py"])
        raise FamilyInvalid(
            f"--family {name} is none of {known}",
            f"name a Python file, or an entry point of {ENTRY_POINTS}",
        )
    return installed[name]


def family_of(name: str) -> Family:
    """Return the family that a golden set names; raise UsageError for an unknown one."""
    found = find_family(name)
    if found is None:
        raise _unknown(f"family {name!r}")
    return found


def find_family(name: str) -> Family | None:
    """Return the family of a name; None for an unknown one."""
    _register_named()
    return _OWN.get(name) or FAMILIES.get(name) or undeclared_family(name)


def family_of_config(config: Mapping[str, Any]) -> Family:
    """Return the family of a config.json, by its class; raise UsageError for an unknown one."""
    _register_named()
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


def _unknown(what: str) -> UsageError:
    return UsageError(
        f"{what} is not supported",
        f"declare it in a file of your own and name that: --family FILE.py, see {PAGE}",
    )
