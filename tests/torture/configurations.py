"""Golden sets whose configuration a stranger wrote, met by FMS itself, which builds what it says.

The set begins as the committed one of a tiny Llama, which the installed FMS has.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

from tests.conftest import ROOT
from tests.torture.mutations import NUMBERS, STRINGS, HostileSet, place_in

_FAMILIES = ROOT / "tests" / "families"
_SIZES = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "head_dim",
    "num_key_value_heads", "vocab_size", "max_position_embeddings",
)  # fmt: skip
_OTHERS = ("rms_norm_eps", "rope_theta", "hidden_act", "tie_word_embeddings", "attention_bias")
_HUGE = (1, 2, 10**3, 10**4, 10**5, 10**6, 10**7, 10**9, 10**12, 2**31, 2**40, 2**62)
_SCALINGS = ("ntk", "llama3", "yarn", "regular", "default", "x")


def write_llama(root: Path) -> Path:
    """Write goldens/ and checkpoints/ of the tiny Llama below `root`; return the set's folder."""
    shutil.copytree(_FAMILIES / "checkpoints" / "llama", root / "checkpoints" / "llama")
    shutil.copytree(_FAMILIES / "goldens" / "local--llama", root / "goldens" / "local--llama")
    (folder,) = (root / "goldens").glob("*/*/cpu-float32")
    return folder


def mutate_configuration(folder: Path, seed: int) -> str:
    """Put something else in the place of one to three of the configuration's values."""
    chance = random.Random(seed)
    hostile = HostileSet(folder, chance)
    tree = json.loads(hostile.manifest.read_text(encoding="utf-8"))
    config = tree["checkpoint"]["config"]
    for _ in range(chance.choice((1, 1, 2, 3))):
        kind = chance.randrange(6)
        if kind < 3:
            config[chance.choice(_SIZES)] = chance.choice(_HUGE)
        elif kind == 3:
            config["rope_scaling"] = _scaling(chance)
        elif kind == 4:
            config[chance.choice((*_SIZES, *_OTHERS))] = chance.choice(
                (*NUMBERS, *STRINGS, None, True, [], {})
            )
        else:
            parent, key = place_in(config, chance)
            parent[key] = chance.choice((*NUMBERS, *STRINGS, None, [], {}, [10**9] * 3))
    hostile.replace(hostile.manifest, json.dumps(tree).encode("utf-8", "surrogatepass"))
    return "mutate_configuration"


def _scaling(chance: random.Random) -> dict[str, Any]:
    fields = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return {
        "rope_type": chance.choice(_SCALINGS),
        **{name: chance.choice((*_HUGE, *NUMBERS)) for name in fields if chance.random() < 0.8},
    }
