"""Build a tiny Idefics3 of other shapes than the embedded checkpoint; weights all random.

usage: python tests/checkpoints/build_other_shapes.py NAME OUT

scale-two: the connector has scale_factor 2, as Idefics3-8B has.
one-key-head: large tiles and patches, five heads on one key/value head, a tied head, three files of
weights, two end tokens.

It needs torch and transformers 4.51.3 (the record environment), no network.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

# Before transformers is imported: it reads this once.
os.environ["HF_HUB_OFFLINE"] = "1"

from builder import language, model, tokenizer

SEED = 0
SHAPES: Mapping[str, model.Shapes] = {
    "scale-two": replace(model.TINY, scale_factor=2),
    "one-key-head": replace(
        model.TINY,
        vision={**model.TINY.vision, "image_size": 128, "patch_size": 8, "num_hidden_layers": 2},
        text={
            **model.TINY.text,
            "hidden_size": 80,
            "num_hidden_layers": 3,
            "num_attention_heads": 5,
            "num_key_value_heads": 1,
            "intermediate_size": 208,
            "tie_word_embeddings": True,
        },
        longest_edge=256,
        end_tokens=(tokenizer.END_OF_UTTERANCE, tokenizer.END_OF_TEXT),
    ),
}
SHARDS = {"scale-two": "5GB", "one-key-head": "800KB"}


def main() -> None:
    """Parse the arguments and build."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=SHAPES)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    shapes = SHAPES[arguments.name]
    words = tokenizer.build_tokenizer(language.corpus(seed=SEED), shapes.text)
    model.build_processor(words, shapes).save_pretrained(arguments.out)
    port = model.build_model(words, shapes, seed=SEED)
    port.save_pretrained(arguments.out, max_shard_size=SHARDS[arguments.name])


if __name__ == "__main__":
    main()
