"""The arithmetic of a large golden set, from what a case keeps: bytes by file, memory, and time.

Bytes follow from snap's own constants and are those that a recording writes (a test compares them
with a recorded set). Time is a bound from below, by a GPU's peak figures as its vendor gives them:
nothing of the kind was run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from snapshot_tool.goldens.parts import TOP_K
from snapshot_tool.taps.sketches import MAX_DIMENSIONS, MOMENTS, PROJECTION_SIZE, SAMPLE_SIZE

MANIFEST_CASE = 5_100  # bytes of a text case's entries, in a set of 1,000 cases of a tiny llama
# One H100: float32 without TF32, and its memory's bandwidth.
GPU_FLOPS, GPU_BANDWIDTH, GPU_MEMORY = 67e12, 3.35e12, 80e9


@dataclass(frozen=True, slots=True)
class Decoder:
    """A text model's shapes, and its cases."""

    parameters: float
    layers: int
    vocabulary: int
    tokens: int
    new_tokens: int
    sampled: int = SAMPLE_SIZE  # distinct ones of the vocabulary; fewer in a small one

    @property
    def modules(self) -> int:
        """Modules that run: 13 in each of Llama's layers, and 5 around them."""
        return 13 * self.layers + 5

    def case_bytes(self) -> dict[str, int]:
        """Return the bytes of one case's tensors, by file."""
        position = TOP_K * (4 + 8) + 4 + self.sampled * 4
        side = MAX_DIMENSIONS * 8 + len(MOMENTS) * 8 + PROJECTION_SIZE * 8 + SAMPLE_SIZE * 4
        return {
            "inputs": self.tokens * 16,
            "forward": self.vocabulary * 4 + self.sampled * 8 + self.tokens * position,
            "generate": self.new_tokens * (8 + TOP_K * (4 + 8) + 4),
            "taps": self.modules * (8 + 2 * side),
        }

    def case_seconds(self, gpus_at_once: int) -> float:
        """Return how long two prompts and a generation take at the peak of so many GPUs."""
        prompt = 2 * self.parameters * self.tokens / GPU_FLOPS
        step = self.parameters * 4 / GPU_BANDWIDTH
        return (2 * prompt + self.new_tokens * step) / gpus_at_once


def lines(model: Decoder, *, cases: int, gpus: int, nodes: int) -> Iterator[str]:
    """Yield the arithmetic, line by line."""
    weights = model.parameters * 4
    yield f"model    {model.parameters / 1e9:g} B parameters, {weights / 1e9:.0f} GB in float32"
    yield f"memory   {weights / 1e9 / gpus:.0f} GB on each of {gpus} GPUs"
    found = model.case_bytes()
    parts = ", ".join(f"{name} {size / 1e3:.0f}" for name, size in found.items())
    yield f"a case   {sum(found.values()) / 1e6:.2f} MB, of these KB: {parts}"
    yield f"set      {sum(found.values()) * cases / 1e9:.1f} GB of {cases:,} cases"
    yield f"manifest {MANIFEST_CASE * cases / 1e6:.0f} MB"
    # accelerate's map runs one GPU after the other; tensor parallelism runs them together.
    for name, at_once in (("record", 1), ("check", gpus)):
        seconds = model.case_seconds(at_once)
        hours = seconds * cases / nodes / 3600
        yield f"{name:<8} {seconds:.1f} s a case at least, {hours:.1f} h on {nodes} nodes"


def main(arguments: list[str] | None = None) -> int:
    """Print the arithmetic of a Llama's golden set; by default 70B and 10,000 cases."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--parameters", type=float, default=70.6e9)
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--new-tokens", type=int, default=20)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--nodes", type=int, default=4)
    given = parser.parse_args(arguments)
    model = Decoder(
        given.parameters, given.layers, given.vocabulary, given.tokens, given.new_tokens
    )
    for line in lines(model, cases=given.cases, gpus=given.gpus, nodes=given.nodes):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
