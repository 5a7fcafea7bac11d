"""The sets that mutations begin from, a candidate for them, and a stranger's configurations.

A configuration is that of the committed set of a tiny Llama, which the installed FMS builds.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from snapshot_tool.base.protocol import CandidateRequest, CaseInputs
from tests.conftest import ROOT
from tests.torture.mutations import NUMBERS, STRINGS, HostileSet, place_in
from tests.unit.factory import REVISION, make_manifest, write_files, write_manifest

CHECKPOINT_TEXT = b'{"model_type": "idefics3"}'
GOLDENS = "goldens"
_FAMILIES = ROOT / "tests" / "families"
_SIZES = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "head_dim",
    "num_key_value_heads", "vocab_size", "max_position_embeddings",
)  # fmt: skip
_OTHERS = ("rms_norm_eps", "rope_theta", "hidden_act", "tie_word_embeddings", "attention_bias")
_HUGE = (1, 2, 10**3, 10**4, 10**5, 10**6, 10**7, 10**9, 10**12, 2**31, 2**40, 2**62)
_SCALINGS = ("ntk", "llama3", "yarn", "regular", "default", "x")


def write_base(root: Path) -> Path:
    """Write goldens/ and checkpoint/ below `root` and return the set's folder."""
    (root / "checkpoint").mkdir(parents=True)
    (root / "checkpoint" / "config.json").write_bytes(CHECKPOINT_TEXT)
    folder = root / GOLDENS / "local--tiny" / REVISION[:12] / "cpu-float32"
    folder.mkdir(parents=True)
    manifest = make_manifest(write_files(folder))
    entry = msgspec.structs.replace(
        manifest.checkpoint,
        family="idefics3",
        location="checkpoint",
        files={"config.json": hashlib.sha256(CHECKPOINT_TEXT).hexdigest()},
        config={"model_type": "idefics3", "text_config": {"vocab_size": 12}},
    )
    write_manifest(folder, msgspec.structs.replace(manifest, checkpoint=entry))
    return folder


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


class Zeros:
    """A candidate that answers with zeros: golden sets are read whole, and nothing is loaded."""

    def __init__(self, request: CandidateRequest) -> None:
        self.vocabulary = 12

    def preprocess(self, images: Sequence[Any]) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.zeros(len(images), 3, 4, 4)}

    def vision(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(pixel_values), 4, 8)

    def connector(self, features: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(features), 1, 8)

    def forward(self, inputs: CaseInputs) -> torch.Tensor:
        return torch.zeros(1, inputs.input_ids.shape[1], self.vocabulary)

    def generate(
        self, inputs: CaseInputs, *, max_new_tokens: int, eos_token_ids: Sequence[int]
    ) -> torch.Tensor:
        return torch.zeros(min(max_new_tokens, 3), dtype=torch.int64)

    def observe_forward(self, inputs: CaseInputs, observe: Any) -> dict[str, str]:
        return {}
