"""Data: from files to masked, packed, randomly addressed batches. Knows tokenizers and NumPy, and no model."""

from specjax.data.corpus import Corpus
from specjax.data.loader import Data
from specjax.data.mix import Mixture, mix
from specjax.data.prepare import chat, instruct, load, preference, text
from specjax.data.tokens import tokenise

__all__ = ["Corpus", "Data", "Mixture", "chat", "instruct", "load", "mix", "preference", "text", "tokenise"]
