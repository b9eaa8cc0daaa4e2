"""A config from its file: a program of the user's, or the JSON that a run saved."""

import ast
import re
import runpy
import traceback
from pathlib import Path

from ml_collections import ConfigDict

from specjax.config import get_config, merge
from specjax.config.checks import TYPES, nearest_key
from specjax.errors import UserError
from specjax.files import read_object


def load_config_file(path: str) -> ConfigDict:
    """The config that a `.py` file's `get_config()` makes, or that a run saved as `config.json`.

    Raises:
      UserError: when there is no such file or it fails, with the file and line.
    """
    if not Path(path).is_file():
        raise UserError(f"There is no config file {path}: give one such as --config=configs/lora.py.")
    if path.endswith(".json"):
        return merge(get_config(), read_object(path), where=f"{path}: config")
    try:
        names = runpy.run_path(path)
        config = names["get_config"]() if "get_config" in names else None
    except (Exception, SystemExit) as error:  # the file is the user's program: whatever it raises is a mistake in it
        raise UserError(_failure(path, error)) from error
    _refuse_doubles(path)
    if not isinstance(config, ConfigDict):
        raise UserError(f"{path} has no get_config() that returns a config: start from one of configs/.")
    return config


def _refuse_doubles(path: str) -> None:
    """Raises `UserError` where a name stands twice in a dict, a fleet or a comparison: Python keeps the last."""
    for node in ast.walk(ast.parse(Path(path).read_text(encoding="utf-8"), path)):
        names = [key for key in node.keys if isinstance(key, ast.Constant)] if isinstance(node, ast.Dict) else []
        given = [(repr(key.value), key.lineno) for key in names]
        if isinstance(node, ast.FunctionDef):
            targets = [target for each in node.body if isinstance(each, ast.Assign) for target in each.targets]
            written = ((ast.unparse(target), target.lineno) for target in targets)
            given = [one for one in written if re.search(r"\.(fleet|compare)(\.\w+|\[.*\])$", one[0])]
        seen = set[str]()
        for name, line in given:
            if name in seen:
                raise UserError(f"{path}:{line}: {name} is given a second time: give one of them another name.")
            seen.add(name)


def _failure(path: str, error: BaseException) -> str:
    """One sentence for what a config file raised, at the line of the file that is to blame."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    line = error.lineno if isinstance(error, SyntaxError) and error.filename == path else (lines or [0])[-1]
    if isinstance(error, UserError):
        return f"{path}:{line}: {error}"
    what = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if unknown := re.search(r'Key \\?"(\w+)\\?" does not exist', what):
        return f"{path}:{line}: '{unknown[1]}' is not a key of the config.{nearest_key(unknown[1], get_config())}"
    if wrong := re.search(r"override field '(\w+)' \(reference\)\. (.*) is of .* to type <class '(\w+)'>", what):
        kind = {kind.__name__: text for kind, text in TYPES.items()}.get(wrong[3], wrong[3])
        return f"{path}:{line}: '{wrong[1]}' takes {kind}, not {wrong[2]!r}."
    return f"{path}:{line}: {what.rstrip('.')}."
