"""The decoder, its parts, its sizes and where its weights came from."""

from specjax.models.config import ModelConfig, Segment
from specjax.models.decoder import Decoder
from specjax.models.origin import Origin

__all__ = ["Decoder", "ModelConfig", "Origin", "Segment"]
