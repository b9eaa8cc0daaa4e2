"""Data: from files to masked, packed, randomly addressed batches. Knows tokenizers and NumPy, and no model."""

from specjax.data.loader import Data
from specjax.data.prepare import chat, instruct, load, text

__all__ = ["Data", "chat", "instruct", "load", "text"]
