"""The advice as a config file: what differs from the defaults, with the rules above each key."""

import pprint
import textwrap
from collections.abc import Mapping
from pathlib import Path

from ml_collections import ConfigDict

from specjax.config import get_config
from specjax.config.checks import FREE, flat
from specjax.errors import UserError

_HEAD = '''"""Written by `specjax advise`: a start by published rules, each above what it set."""

from specjax.config import ConfigDict
from specjax.config import get_config as defaults


def get_config() -> ConfigDict:
    """The defaults, but for what was advised."""
    config = defaults()
'''
_WIDTH = 110


def check(out: str) -> None:
    """Raises `UserError` if a Python file cannot be written there, before anything is read."""
    path = Path(out)
    if path.suffix != ".py":
        raise UserError(f"--out={out} is no Python file: give a name that ends in .py, such as --out=advised.py.")
    if path.exists():
        raise UserError(f"--out={out} is there already and is left as it is: give another name, or move it away.")
    if not path.parent.is_dir():
        raise UserError(f"--out={out}: there is no folder {path.parent}: make it, or give another place.")


def write(out: str, made: str) -> None:
    """Writes a new file.

    Raises:
      UserError: the file exists by now.
    """
    try:
        with Path(out).open("x", encoding="utf-8") as file:
            file.write(made)
    except FileExistsError:
        raise UserError(f"--out={out} is there already and is left as it is: give another name.") from None


def text(config: ConfigDict, why: Mapping[str, str]) -> str:
    """A config that `read_config` reads as this one.

    Args:
      config: the advice.
      why: key -> the rules behind its value.
    """
    default = dict(flat(get_config().to_dict()))
    lines = []
    for key, value in flat(config.to_dict()):
        if key in default and default[key] == value:
            continue
        lines += [f"    # {line}" for line in textwrap.wrap(why.get(key, ""), _WIDTH, break_on_hyphens=False)]
        group, _, name = key.rpartition(".")
        place = f"config.{group}[{name!r}]" if group in FREE else f"config.{key}"
        lines.append(f"    {place} = {pprint.pformat(value)}")
    return _HEAD + "\n".join(lines) + "\n    return config\n"
