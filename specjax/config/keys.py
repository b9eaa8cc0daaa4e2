"""What every key of the config means: read from `specjax.config.get_config`, where key, default and meaning stand.

So `specjax help config`, the reference in the documentation and the defaults cannot say different things.
"""

import ast
import dataclasses
import functools
import inspect
import io
import textwrap
import tokenize
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference

from specjax.config import get_config
from specjax.config.checks import CHOICES, TYPES, nearest_key
from specjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Key:
    """One key.

    Attributes:
      name: dotted, without "config.".
      default: as it is typed; "" where none is set.
      takes: the type, in words.
      choices: the values that there are, where they can be counted.
      means: the comment of `get_config`.
    """

    name: str
    default: str
    takes: str
    choices: tuple[str, ...]
    means: str

    @property
    def group(self) -> str:
        """The name in front of the last dot; "" for a key of the config itself."""
        return self.name.rpartition(".")[0]


@functools.cache
def keys() -> tuple[Key, ...]:
    """Every key, in the order of `get_config`.

    Groups whose names are the user's own (`data.eval`, `data.columns`, `compare`) are one key each.
    """
    defaults, found = get_config(), []
    for name, means in _comments(inspect.getsource(get_config)).items():
        node = defaults
        for part in name.split(".")[:-1]:
            node = node[part]
        last = name.rpartition(".")[2]
        value = node[last]
        if isinstance(value, ConfigDict):
            if not value:
                found.append(Key(name, "", "names, each with its value", (), means))
            continue
        choices = tuple(choice for choice in CHOICES.get(name, ()) if choice)
        found.append(Key(name, _typed(value), TYPES.get(node.get_type(last), "a value"), choices, means))
    return tuple(found)


def help_of(name: str, width: int) -> str:
    """The keys of a group, or one key, as text.

    Args:
      name: "config" for all, or "config.GROUP", "config.KEY".
      width: columns.

    Raises:
      UserError: there is no such key or group.
    """
    wanted = name.removeprefix("config").lstrip(".")
    shown = [key for key in keys() if not wanted or key.name == wanted or key.name.startswith(f"{wanted}.")]
    if not shown:
        raise UserError(f"config.{wanted} is no key and no group of keys.{nearest_key(wanted, get_config())}")
    lines = []
    for key in shown:
        lines.append(f"--config.{key.name}={key.default}" + ("" if key.default else f"  ({key.takes})"))
        lines += textwrap.wrap(key.means, width, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines) + "\n"


def _typed(value: Any) -> str:
    if isinstance(value, FieldReference):
        value = value.get()
    return "" if value is None or value == () else ",".join(value) if isinstance(value, tuple) else str(value)


def _comments(source: str) -> dict[str, str]:
    """Dotted key -> the comments above and beside the line that sets it."""
    source = textwrap.dedent(source)
    beside, above = dict[int, str](), dict[int, str]()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            own = not token.line[: token.start[1]].strip()
            (above if own else beside)[token.start[0]] = token.string.lstrip("# ")
    found = {}
    [function] = ast.parse(source).body
    assert isinstance(function, ast.FunctionDef)
    for statement in function.body:
        if not isinstance(statement, ast.Assign):
            continue
        dotted = ast.unparse(statement.targets[0])
        if not dotted.startswith("config."):
            continue
        first, last = statement.lineno, statement.end_lineno or statement.lineno
        texts = [beside[line] for line in range(first, last + 1) if line in beside]
        while (first := first - 1) in above:
            texts.insert(0, above[first])
        found[dotted.removeprefix("config.")] = " ".join(texts)
    return found
