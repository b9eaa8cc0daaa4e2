"""A folder's tokenizer, read and written."""

from pathlib import Path
from typing import Any

import transformers

from specjax.errors import UserError
from specjax.files import read_object
from specjax.hf.folder import has_tokenizer


def load_tokenizer(folder: str | Path) -> Any:
    """The folder's tokenizer, or None where it has none. Code that a folder brings along is never run, nor asked about.

    Raises:
      UserError: its files do not load, or name a class that is code of the folder's own.
    """
    if not has_tokenizer(folder):
        return None
    try:
        # Not given, it asks on the terminal, and reads the answer from whatever is standard input.
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if any("auto_map" in read_object(file) for file in Path(folder).glob("*config.json")):
            raise UserError(
                f"{folder}: its tokenizer is code of its own (auto_map), which is not run here: give a folder whose "
                "tokenizer transformers knows, with a tokenizer.json."
            ) from error
        raise UserError(f"{folder}: its tokenizer does not load ({str(error).strip().splitlines()[0]}).") from error
