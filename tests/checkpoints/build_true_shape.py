"""Build the true-shape checkpoint: random weights in the shapes of SmolVLM-256M-Instruct.

usage: python tests/checkpoints/build_true_shape.py OUT

It needs torch and transformers 4.51.3 (the record environment), no network, and 1.1 GB in OUT. The
same machine gives the same bytes. The tokenizer knows 480 of the 49,280 tokens.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

# Before transformers is imported: it reads this once.
os.environ["HF_HUB_OFFLINE"] = "1"

from builder import language, model, tokenizer

SEED = 0
# HuggingFaceTB/SmolVLM-256M-Instruct, config.json and preprocessor_config.json, the latter with
# transformers' default for Idefics3: a longest edge of 4 tiles.
TRUE = model.Shapes(
    vision={
        "image_size": 512,
        "patch_size": 16,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    },
    text={
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "max_position_embeddings": 8192,
        "vocab_size": 49280,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    },
    scale_factor=4,
    longest_edge=2048,
)


def main() -> int:
    """Parse the arguments and build."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    small = {**TRUE.text, "vocab_size": model.TINY.text["vocab_size"]}
    words = tokenizer.build_tokenizer(language.corpus(seed=SEED), small)
    drawn = model.build_model(words, TRUE, seed=SEED)
    model.build_processor(words, TRUE).save_pretrained(out)
    drawn.save_pretrained(out)
    print(f"{sum(p.numel() for p in drawn.parameters())} parameters, written to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
