"""Files behind an address, `hf://`, `gs://`, `s3://` and whatever else fsspec knows, brought here once.

They lie in the cache's folder by address and by what the store says of their state (size, time, etag), so that a file
that changed there is brought again. A file appears whole or not at all.
"""

import os
import re
import urllib.parse
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from specjax.data.cache import digest, folder_of
from specjax.errors import UserError


def is_address(source: str) -> bool:
    """Whether it has a scheme.

    >>> is_address("s3://bucket/train.jsonl"), is_address("data/train.jsonl"), is_address("C:/train.jsonl")
    (True, False, False)
    """
    return re.match(r"[a-z][a-z0-9+.-]+://", source) is not None


def brought(source: str, chosen: Callable[[Sequence[Path]], Sequence[Path]]) -> list[tuple[Path, str]]:
    """Files here, each with its address.

    Args:
      source: the address of a file or a folder.
      chosen: of a folder's files, those that are wanted.

    Raises:
      UserError: the package that knows the scheme is not installed, or the store gives no such file.
    """
    import fsspec

    if urllib.parse.urlsplit(source).password is not None:
        # It would stand in the run's config.json, in its logs and in errors.
        raise UserError(
            "a data source's address has a password in it, which a run would write down: take it out, and give it by "
            "the environment or the store's own settings."
        )
    scheme = source.partition("://")[0]
    try:
        store, root = fsspec.core.url_to_fs(source)
        if store.isdir(root):
            names = [str(path) for path in chosen([Path(name) for name in sorted(store.find(root))])]
        else:
            names = [root]
        return [(_file(store, scheme, name), store.unstrip_protocol(name)) for name in names]
    except ImportError as error:
        raise UserError(f"{source} wants a package that is not installed: {error}.") from error
    except UserError:
        raise
    except Exception as error:  # each store has errors of its own
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"{source} can't be read ({reason}): check it and the network.") from error


def _file(store: Any, scheme: str, name: str) -> Path:
    folder = folder_of(True)
    assert folder is not None
    path = folder / "remote" / digest(scheme, name, str(store.ukey(name))) / Path(name).name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{uuid.uuid4().hex}.partial")
        try:
            store.get_file(name, str(partial))
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    return path
