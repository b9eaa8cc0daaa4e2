"""Writing a folder whole or not at all, and never over somebody's files."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from specjax.errors import UserError


@contextlib.contextmanager
def new_folder(out: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty folder beside `out` that takes its place when the block ends well.

    Args:
      out: the folder to make.
      overwrite: replace the files of the same names in an existing folder; its other files stay.

    Raises:
      UserError: `out` exists and is not empty (and `overwrite` is False), or is a file.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: choose another output folder.")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise UserError(f"{out} exists and is not empty: choose another output folder, or give overwrite.")
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield staging
        # mkdtemp and safetensors make private files; these are as open as any other of the user's.
        mask = os.umask(0)
        os.umask(mask)
        staging.chmod(0o777 & ~mask)
        for file in staging.iterdir():
            file.chmod(0o666 & ~mask)
        if out.is_dir() and any(out.iterdir()):
            # Shards of an earlier export would be read beside the new ones.
            for stale in out.glob("*.safetensors*"):
                stale.unlink()
            for file in staging.iterdir():
                os.replace(file, out / file.name)
        else:
            os.replace(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
