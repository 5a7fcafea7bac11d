"""Single faults in an FMS checkout, planted by editing its source.

    python tests/fms_checkout/faults.py NAME OUT [--checkout build/fms-checkout]

Each is one line that a person could get wrong. The tests plant every one of them and expect `snap`
to find it in the phase named here; the demo plants one and shows it.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

_MODEL = "fms/models/idefics3.py"
_PREPROCESSING = "fms/models/idefics3_preprocessing.py"
_LLAMA = "fms/models/llama.py"
_SIGLIP = "fms/models/siglip_vision.py"


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault: the first phase that it shows in, the file, and what becomes of which text."""

    name: str
    phase: str
    file: str
    old: str
    new: str


FAULTS = (
    Fault(
        "tiles-swapped",
        "preprocessing",
        _PREPROCESSING,
        "return [*tiles, picture",
        "return [tiles[1], tiles[0], *tiles[2:], picture",
    ),
    Fault(
        "whole-image-first",
        "preprocessing",
        _PREPROCESSING,
        "return [*tiles, picture.resized(side, side, self.resample).pixels]",
        "return [picture.resized(side, side, self.resample).pixels, *tiles]",
    ),
    Fault(
        "bicubic-resize",
        "preprocessing",
        _PREPROCESSING,
        'self.resample = config.get("resample", Image.Resampling.LANCZOS)',
        "self.resample = Image.Resampling.BICUBIC",
    ),
    Fault(
        "transparency-dropped",
        "preprocessing",
        _PREPROCESSING,
        'return np.array(Image.alpha_composite(white, opaque).convert("RGB"))',
        'return np.array(opaque.convert("RGB"))',
    ),
    Fault(
        "exact-gelu",
        "vision",
        "fms/utils/activation.py",
        '"gelu-tanh": GELUTanh,',
        '"gelu-tanh": nn.GELU,',
    ),
    Fault(
        "causal-vision",
        "vision",
        _SIGLIP,
        'attn_kwargs.get("attn_name", "sdpa_bidirectional")',
        'attn_kwargs.get("attn_name", "sdpa_causal")',
    ),
    Fault(
        "shuffle-transposed",
        "connector",
        _MODEL,
        "x.permute(0, 1, 3, 2, 4, 5)",
        "x.permute(0, 1, 3, 4, 2, 5)",
    ),
    Fault(
        "rope-base",
        "forward",
        _LLAMA,
        "ratio=self.config.rope_theta,",
        "ratio=10_000.0,",
    ),
    Fault(
        "padding-ignored",
        "forward",
        _MODEL,
        "if attention_mask is None:",
        "if True:",
    ),
    Fault(
        "not-causal",
        "forward",
        _MODEL,
        "attention_mask.shape[1]:\n            return {}",
        'attention_mask.shape[1]:\n            return {"attn_name": "sdpa_bidirectional"}',
    ),
    Fault(
        "images-out-of-order",
        "forward",
        _MODEL,
        "features, _ = self.vision_tower(pixel_values.flatten(0, -4))",
        "features, _ = self.vision_tower(pixel_values.flatten(0, -4).flip(0))",
    ),
    Fault(
        "end-token-ignored",
        "generate",
        _MODEL,
        "stop = ends[0] if len(ends) == 1 and len(input_ids) == 1 else None",
        "stop = ends = None",
    ),
    Fault(
        "images-in-every-step",
        "generate",
        _MODEL,
        "(self._embed(ids, pixel_values) if iteration == 0 else ids)",
        "self._embed(ids, None)",
    ),
)

# Faults that no recorded case of the committed golden set shows: only derived questions do.
HIDDEN_FAULTS = (
    Fault(
        "length-of-heads",  # FMS 1.13.1 as it is: see INSERTIONS in build.py
        "forward",
        "fms/modules/attention.py",
        "keys_compute, values_compute = keys.transpose(2, 1), values.transpose(2, 1)",
        "keys_compute, values_compute = keys, values",
    ),
    Fault(
        "cache-off-by-one",
        "forward",
        _MODEL,
        '"position_ids": (real.cumsum(-1) - 1).clamp(min=0)[:, -new:],',
        '"position_ids": (real.cumsum(-1) - 1).clamp(min=0)[:, :new],',
    ),
    Fault(
        "mask-of-first-row",
        "forward",
        _MODEL,
        '"mask": torch.where(mask, 0.0, -torch.inf)[:, -new:],',
        '"mask": torch.where(mask, 0.0, -torch.inf)[:1, -new:],',
    ),
    Fault(
        "batch-ends-with-first-row",
        "generate",
        _MODEL,
        "longest = int((~after).sum(-1).max())",
        "longest = int((~after).sum(-1).min())",
    ),
    Fault(
        "images-across-rows",
        "forward",
        _MODEL,
        "merged[places] = tokens.to(embeddings.dtype)",
        "merged.transpose(0, 1)[places.T] = tokens.to(embeddings.dtype)",
    ),
    Fault(
        "single-tile-squeezed",
        "vision",
        _SIGLIP,
        "last_hidden_state = self.post_layernorm(last_hidden_state)",
        "last_hidden_state = self.post_layernorm(last_hidden_state).squeeze(0)",
    ),
)


def plant(fault: Fault, *, checkout: Path, out: Path) -> None:
    """Copy a checkout to `out` and plant a fault in the copy; git sees it as a change."""
    shutil.copytree(checkout, out, ignore=shutil.ignore_patterns("__pycache__"))
    path = out / fault.file
    source = path.read_text(encoding="utf-8")
    if source.count(fault.old) != 1:
        raise ValueError(f"{fault.name}: {fault.file} has not once: {fault.old!r}")
    path.write_text(source.replace(fault.old, fault.new), encoding="utf-8")


def main() -> None:
    """Read the arguments and plant."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=[fault.name for fault in FAULTS + HIDDEN_FAULTS])
    parser.add_argument("out", type=Path)
    parser.add_argument("--checkout", type=Path, default=Path("build/fms-checkout"))
    arguments = parser.parse_args()
    if arguments.out.exists():
        sys.exit(f"{arguments.out} exists already")
    (fault,) = (fault for fault in FAULTS + HIDDEN_FAULTS if fault.name == arguments.name)
    plant(fault, checkout=arguments.checkout, out=arguments.out)


if __name__ == "__main__":
    main()
