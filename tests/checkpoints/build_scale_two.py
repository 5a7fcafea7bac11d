"""Build a tiny Idefics3 whose connector has scale_factor 2, as Idefics3-8B has; weights all random.

usage: python tests/checkpoints/build_scale_two.py OUT

It needs torch and transformers 4.51.3 (the record environment), no network.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path

# Before transformers is imported: it reads this once.
os.environ["HF_HUB_OFFLINE"] = "1"

from builder import language, model, tokenizer

SEED = 0


def main() -> None:
    """Parse the arguments and build."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    shapes = replace(model.TINY, scale_factor=2)
    words = tokenizer.build_tokenizer(language.corpus(seed=SEED), shapes.text)
    model.build_processor(words, shapes).save_pretrained(out)
    model.build_model(words, shapes, seed=SEED).save_pretrained(out)


if __name__ == "__main__":
    main()
