"""The parts of idefics3."""

from .connector import Idefics3Connector
from .fms_model import Idefics3, Idefics3Config
from .pack import pack_image_embeddings

__all__ = ["Idefics3", "Idefics3Config", "Idefics3Connector", "pack_image_embeddings"]
