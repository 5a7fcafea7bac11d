"""Hugging Face's processor, or the one of this checkout where it is asked for.

IDEFICS3_PREPROCESSOR=own in the environment asks for it: tests of preprocessing run without
transformers.
"""

import os

import torch

from .own_preprocessing import load_own_preprocessor


def load_smolvlm_processor(checkpoint_name, **kwargs):
    """Return transformers' AutoProcessor of a checkpoint."""
    try:
        from transformers import AutoProcessor
    except ImportError as error:
        raise ImportError("idefics3's processor is transformers' own") from error
    return AutoProcessor.from_pretrained(checkpoint_name, **kwargs)


class _Preprocessor:
    """A processor with the method `preprocess`."""

    def __init__(self, processor):
        self.processor = processor

    def preprocess(self, image):
        """Return `pixel_values` (1, tiles, 3, H, W), their mask and the number of tiles."""
        answer = self.processor(images=image, return_tensors="pt")
        pixels = answer["pixel_values"]
        mask = answer.get("pixel_attention_mask")
        if mask is None:
            mask = torch.ones_like(pixels[:, :, 0], dtype=torch.int64)
        return {
            "pixel_values": pixels,
            "pixel_attention_mask": mask,
            "num_patches": pixels.shape[1],
        }


def load_smolvlm_preprocessor(checkpoint_name, **kwargs):
    """Return an object whose `preprocess(image)` gives tensors by name."""
    if os.environ.get("IDEFICS3_PREPROCESSOR") == "own":
        return load_own_preprocessor(checkpoint_name)
    return _Preprocessor(load_smolvlm_processor(checkpoint_name, **kwargs))
