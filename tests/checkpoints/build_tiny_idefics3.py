"""Build the embedded checkpoint: a tiny Idefics3, trained for minutes, that a test can rely on.

usage: python tests/checkpoints/build_tiny_idefics3.py [--out DIR]

It needs torch, transformers 4.51.3 and pillow (the record environment), no network. The same
machine gives the same bytes. A checkpoint that misses a figure is not written: exit 1, and what
was in DIR stays as it was.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

# Before transformers is imported: it reads this once.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from builder import figures, language, model, tokenizer, training
from transformers import AutoModelForVision2Seq, AutoProcessor

SEED = 0
THREADS = 2  # fixed: sums over another number of parts round differently
MAX_BYTES = 2_800_000
DEFAULT_OUT = Path(__file__).parent / "tiny-idefics3"


def train_checkpoint(folder: Path) -> float:
    """Make tokenizer, processor and model, train, save to a folder; return the training seconds."""
    wrapped = tokenizer.build_tokenizer(language.corpus(seed=SEED), model.TINY.text)
    processor = model.build_processor(wrapped)
    tiny = model.build_model(wrapped, seed=SEED)
    seconds = training.train(tiny, processor, seed=SEED)
    model.amplify_features(tiny)
    processor.save_pretrained(folder)
    tiny.save_pretrained(folder)
    return seconds


def load_checkpoint(folder: Path) -> tuple[Any, Any]:
    """Load model and processor as a user would, and refuse weights that do not fit."""
    loaded, info = AutoModelForVision2Seq.from_pretrained(folder, output_loading_info=True)
    wrong = {kind: keys for kind, keys in info.items() if keys}
    if wrong:
        raise ValueError(f"the checkpoint does not load cleanly: {wrong}")
    return loaded.eval(), AutoProcessor.from_pretrained(folder)


def folder_bytes(folder: Path) -> int:
    """Return the size of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def replace_folder(staged: Path, out: Path) -> None:
    """Put the staged folder in the place of the old one, which goes with the scratch folder."""
    for path in staged.iterdir():
        path.chmod(0o644)  # safetensors leaves its file readable by its owner alone
    old = staged.with_name("old")
    if out.exists():
        out.rename(old)
    try:
        staged.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise


def print_files(folder: Path) -> None:
    """Print each file's size and digest."""
    for path in sorted(folder.iterdir()):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        print(f"{path.stat().st_size:>9}  {digest[:16]}  {path.name}")


def build(out: Path) -> int:
    """Build, measure, and write what meets every figure; return the exit code."""
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside `out`, so that the last step is a rename on one file system.
    with tempfile.TemporaryDirectory(prefix=".build-", dir=out.parent) as scratch:
        staged = Path(scratch) / "staged"
        seconds = train_checkpoint(staged)
        tiny, processor = load_checkpoint(staged)
        measured = figures.measure(tiny, processor)
        size = folder_bytes(staged)
        shortcomings = list(measured.shortcomings)
        if size > MAX_BYTES:
            shortcomings.append(f"{size} bytes, more than {MAX_BYTES}")
        print(figures.report(measured))
        print()
        print(f"{sum(p.numel() for p in tiny.parameters())} parameters, {size} bytes")
        print(f"trained for {seconds:.0f} s", file=sys.stderr)
        print_files(staged)
        if shortcomings:
            print("not written:", *shortcomings, sep="\n  ", file=sys.stderr)
            return 1
        replace_folder(staged, out)
    print(f"written to {out}", file=sys.stderr)
    return 0


def main() -> int:
    """Parse the arguments and build."""
    parser = argparse.ArgumentParser(description="Build the tiny Idefics3 checkpoint.")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, metavar="DIR")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("highest")
    return build(arguments.out.resolve())


if __name__ == "__main__":
    sys.exit(main())
