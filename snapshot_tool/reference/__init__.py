"""The Hugging Face side: the only package that imports transformers or accelerate."""

from __future__ import annotations

from pathlib import Path

from snapshot_tool.core.errors import ReferenceUnavailable
from snapshot_tool.core.interfaces import Reference


def load_reference(
    checkpoint: Path, *, device: str, dtype: str, seed: int, trusts_code: bool = False
) -> Reference:
    """Load the model of a checkpoint's folder; raise ReferenceUnavailable without Hugging Face.

    trusts_code: run the Python files that the checkpoint brings along.
    """
    try:
        from snapshot_tool.reference.huggingface import HuggingFaceReference
    except ImportError as error:
        raise ReferenceUnavailable(
            f"recording needs transformers and accelerate, which are not here: {error}",
            "install them with: pip install 'snapshot-tool[record]'",
        ) from error
    return HuggingFaceReference.load(
        checkpoint, device=device, dtype=dtype, seed=seed, trusts_code=trusts_code
    )
