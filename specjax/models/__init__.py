"""The decoder, its parts and its sizes."""

from specjax.models.config import ModelConfig
from specjax.models.decoder import Decoder

__all__ = ["Decoder", "ModelConfig"]
