"""Model families: what snap has to know of each, as data, for the reference and for FMS alike."""

from snapshot_tool.core.errors import UsageError
from snapshot_tool.families.family import Family
from snapshot_tool.families.idefics3 import IDEFICS3

FAMILIES: dict[str, Family] = {family.name: family for family in (IDEFICS3,)}


def family_of(model_type: str) -> Family:
    """Return the family of a config.json's `model_type`; raise UsageError for an unknown one."""
    if model_type not in FAMILIES:
        raise UsageError(
            f"model_type {model_type!r} is not supported (supported: {', '.join(FAMILIES)})",
            "choose a checkpoint of a supported family",
        )
    return FAMILIES[model_type]
