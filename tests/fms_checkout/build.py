"""Lay out an FMS checkout with idefics3: the installed `fms`, the overlay, and a git history.

    python tests/fms_checkout/build.py [--out build/fms-checkout]

Run it with a Python that has ibm-fms. What comes out looks like a checkout of
foundation-model-stack on a branch that carries idefics3: `--fms-path` points at it. It is built
again only when the overlay, this script or the installed FMS changed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
OVERLAY = HERE / "overlay"
STAMP = ".overlay-digest"

# What a branch with idefics3 changes in files that FMS has: file, text to find, text to put there.
INSERTIONS = (
    # FMS 1.13.1 tells (batch, length, heads, …) from (batch, heads, length, …) by its sizes alone:
    # without a cache, a prompt of as many tokens as key-value heads is attended to the wrong way.
    (
        "fms/modules/attention.py",
        "            keys_compute, values_compute = keys, values\n",
        "            keys_compute, values_compute = keys.transpose(2, 1), values.transpose(2, 1)\n",
    ),
    (
        "fms/models/__init__.py",
        "    gpt_oss,\n    granite,\n",
        "    gpt_oss,\n    granite,\n    idefics3,\n",
    ),
    (
        "fms/models/__init__.py",
        '    "gpt_oss",\n    "granite",\n',
        '    "gpt_oss",\n    "granite",\n    "idefics3",\n',
    ),
    (
        "fms/models/hf/config_utils/__init__.py",
        '    "LlamaForCausalLM": ("llama", pb.build_llama_params),\n',
        """\
    "LlamaForCausalLM": ("llama", pb.build_llama_params),
    "Idefics3ForConditionalGeneration": ("idefics3", pb.build_idefics3_params),
""",
    ),
    (
        "fms/models/hf/config_utils/param_builders.py",
        "def build_gpt_bigcode_params(",
        '''def build_idefics3_params(config: PretrainedConfig) -> dict:
    """Param builder for mapping Idefics3ForConditionalGeneration to FMS."""
    from fms.models.llama import LLaMAConfig

    vision = build_siglip_vision_params(config)
    text = build_llama_params(config.text_config)
    grid = vision["image_size"] // vision["patch_size"]
    pad = config.text_config.pad_token_id
    return {
        "vision_config": SiglipVisionConfig(**vision, use_navit_position_buckets=True),
        "text_config": LLaMAConfig(**{**text, "pad_id": 0 if pad is None else pad}),
        "image_token_id": config.image_token_id,
        "connector_scale": config.scale_factor,
        "image_span_len": (grid // config.scale_factor) ** 2,
    }


def build_gpt_bigcode_params(''',
    ),
    (
        "fms/models/llama.py",
        "        use_cache=False,\n        **attn_kwargs: Unpack[AttentionKwargs],\n    ):\n"
        "        # Embed the given",
        "        use_cache=False,\n        inputs_embeds=None,\n"
        "        **attn_kwargs: Unpack[AttentionKwargs],\n    ):\n        # Embed the given",
    ),
    (
        "fms/models/llama.py",
        "        x_in = self.embedding(x_in)\n",
        "        x_in = self.embedding(x_in) if inputs_embeds is None else inputs_embeds\n",
    ),
    (
        "fms/models/siglip_vision.py",
        "    fused_weights: bool = True\n\n\nclass SiglipVisionEmbeddings",
        "    fused_weights: bool = True\n    use_navit_position_buckets: bool = False\n\n\n"
        "class SiglipVisionEmbeddings",
    ),
    (
        "fms/models/siglip_vision.py",
        "    def forward(self, pixel_values: torch.FloatTensor) -> torch.Tensor:\n",
        '''    def _positions(self, patch_attention_mask: torch.Tensor) -> torch.Tensor:
        """Return the table's row for each patch of tiles (tiles, grid, grid), 0 for padding."""
        side = self.image_size // self.patch_size
        tall = patch_attention_mask.any(2).sum(1).clamp(min=1)[:, None, None]
        wide = patch_attention_mask.any(1).sum(1).clamp(min=1)[:, None, None]
        place = torch.arange(side, device=patch_attention_mask.device)
        rows, columns = place[:, None] * side // tall, place * side // wide
        return ((rows * side + columns) * patch_attention_mask).flatten(1)

    def forward(
        self,
        pixel_values: torch.FloatTensor,
        patch_attention_mask: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
''',
    ),
    (
        "fms/models/siglip_vision.py",
        "        embeddings = embeddings + self.position_embedding(self.position_ids)\n",
        """\
        if patch_attention_mask is not None and self.config.use_navit_position_buckets:
            positions = self._positions(patch_attention_mask)
            return embeddings + self.position_embedding(positions)
        embeddings = embeddings + self.position_embedding(self.position_ids)
""",
    ),
    (
        "fms/models/siglip_vision.py",
        "        output_hidden_states=False,\n        **attn_kwargs: Unpack[AttentionKwargs],\n"
        "    ):\n        hidden_states = self.embeddings(pixel_values)\n",
        "        patch_attention_mask: Optional[torch.BoolTensor] = None,\n"
        "        output_hidden_states=False,\n        **attn_kwargs: Unpack[AttentionKwargs],\n"
        "    ):\n        hidden_states = self.embeddings(pixel_values, patch_attention_mask)\n",
    ),
    (
        "fms/models/siglip_vision.py",
        """\
        pixel_values,
        output_hidden_states=False,
        **attn_kwargs: Unpack[AttentionKwargs],
    ):
        last_hidden_state, hidden_states = self.base_model(
            pixel_values, output_hidden_states=output_hidden_states, **attn_kwargs
        )
""",
        """\
        pixel_values,
        patch_attention_mask: Optional[torch.BoolTensor] = None,
        output_hidden_states=False,
        **attn_kwargs: Unpack[AttentionKwargs],
    ):
        last_hidden_state, hidden_states = self.base_model(
            pixel_values, patch_attention_mask, output_hidden_states, **attn_kwargs
        )
""",
    ),
)

PYPROJECT = """\
[project]
name = "ibm-fms"
version = "0"
description = "foundation-model-stack {version} with idefics3, laid out for tests"
"""

# Fixed, so that the same content has the same commit.
IDENTITY = {
    "GIT_AUTHOR_NAME": "fms-checkout",
    "GIT_AUTHOR_EMAIL": "fms-checkout@localhost",
    "GIT_AUTHOR_DATE": "2026-01-01T00:00:00Z",
    "GIT_COMMITTER_NAME": "fms-checkout",
    "GIT_COMMITTER_EMAIL": "fms-checkout@localhost",
    "GIT_COMMITTER_DATE": "2026-01-01T00:00:00Z",
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
}


def installed_fms() -> Path:
    """Return the folder of the installed package, whatever was imported as fms."""
    try:
        found = importlib.metadata.distribution("ibm-fms").locate_file("fms")
    except importlib.metadata.PackageNotFoundError:
        sys.exit("no ibm-fms in this environment: pip install --no-deps ibm-fms")
    return Path(str(found))


def digest() -> str:
    """Return what the checkout is made of, as one digest."""
    total = hashlib.sha256(importlib.metadata.version("ibm-fms").encode())
    for path in sorted([Path(__file__), *OVERLAY.rglob("*.py")]):
        total.update(path.read_bytes())
    return total.hexdigest()


def insert(root: Path) -> None:
    """Apply the insertions; stop where FMS no longer has the text that they hang on."""
    for name, anchor, text in INSERTIONS:
        path = root / name
        source = path.read_text(encoding="utf-8")
        if source.count(anchor) != 1:
            sys.exit(f"{name} has {source.count(anchor)} times, not once: {anchor!r}")
        path.write_text(source.replace(anchor, text), encoding="utf-8")


def git(root: Path, *arguments: str) -> None:
    """Run git in a checkout, independent of the user's configuration."""
    command = ["git", "-C", str(root), *arguments]
    subprocess.run(command, check=True, env={**os.environ, **IDENTITY})


def lay_out(root: Path, stamp: str) -> None:
    """Fill an empty folder with the checkout."""
    shutil.copytree(
        installed_fms(), root / "fms", ignore=shutil.ignore_patterns("__pycache__", "*.pyc")
    )
    shutil.copytree(OVERLAY, root, dirs_exist_ok=True)
    insert(root)
    version = importlib.metadata.version("ibm-fms")
    (root / "pyproject.toml").write_text(PYPROJECT.format(version=version), encoding="utf-8")
    (root / ".gitignore").write_text(f"__pycache__/\n{STAMP}\n", encoding="utf-8")
    git(root, "init", "--quiet", "--initial-branch=idefics3")
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "Add idefics3")
    (root / STAMP).write_text(stamp, encoding="utf-8")


def build(out: Path) -> None:
    """Build the checkout unless it is there and current; never leave half of one."""
    stamp = digest()
    if (out / STAMP).is_file() and (out / STAMP).read_text(encoding="utf-8") == stamp:
        print(f"{out} is current")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".fms-checkout-") as staging:
        root = Path(staging) / "checkout"
        root.mkdir()
        lay_out(root, stamp)
        if out.exists():
            shutil.rmtree(out)
        root.rename(out)
    print(f"built {out}")


def main() -> None:
    """Read the arguments and build."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/fms-checkout"))
    build(parser.parse_args().out)


if __name__ == "__main__":
    main()
