"""A user's mistake, as opposed to a bug of ours."""

import contextlib
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping

_OPEN, _CLOSE = "\ue000", "\ue001"  # of Unicode's private use: no text of a user's has them


class UserError(Exception):
    """A mistake that the user can mend, told in one sentence: what, where (file:line, key, tensor), what to do.

    The command line prints the sentence on stderr and exits with status 2; a bug of ours keeps its traceback. A library
    function names its caller's arguments by `argument`; who calls it with values that are called otherwise, such as
    keys of a config, says so by `keys`.
    """

    def __init__(self, sentence: str):
        super().__init__(sentence)
        self.keys: dict[str, str] = {}

    def __str__(self) -> str:
        return re.sub(f"{_OPEN}([^{_CLOSE}]*){_CLOSE}", lambda hit: self._shown(hit[1]), str(self.args[0]))

    def _shown(self, name: str) -> str:
        whole, _, entry = name.partition(".")
        if name in self.keys or not entry:
            return self.keys.get(name, name)
        return f"{self.keys[whole]}.{entry}" if whole in self.keys else f"{whole}[{entry!r}]"


class NotFinite(UserError):
    """A loss, a gradient or a weight became infinite or NaN: most often the learning rate is too high."""


def argument(name: str) -> str:
    """The name of a function's argument, to be put into the sentence of a `UserError`.

    `name.entry` is an entry of an argument that is a dict; `name=value` is an argument with a value to give.

    >>> str(UserError(f"{argument('split')} is 'x'.")), str(UserError(f"{argument('columns.text')} is 'x'."))
    ("split is 'x'.", "columns['text'] is 'x'.")
    """
    return f"{_OPEN}{name}{_CLOSE}"


@contextlib.contextmanager
def keys(names: Mapping[str, str]) -> Iterator[None]:
    """In here, and in a function that it decorates, arguments are called by other names in the errors that come out.

    Args:
      names: argument -> what the user calls it.

    >>> with keys({"columns": "config.data.columns"}):
    ...     raise UserError(f"{argument('columns.text')} is 'x'.")
    Traceback (most recent call last):
    specjax.errors.UserError: config.data.columns.text is 'x'.
    """
    try:
        yield
    except UserError as error:
        error.keys = {**names, **error.keys}  # who is nearer to the mistake knows better
        raise


@contextlib.contextmanager
def naming(what: str) -> Iterator[None]:
    """In here, what is wrong is said of `what`.

    >>> with naming("adapter hr"):
    ...     raise UserError("its rank is 0.")
    Traceback (most recent call last):
    specjax.errors.UserError: adapter hr: its rank is 0.
    """
    try:
        yield
    except UserError as error:
        error.args = (f"{what}: {error.args[0]}",)
        raise


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint that names the nearest of `names`, or nothing.

    >>> nearest("lenght", ["length", "seed"])
    " Did you mean 'length'?"
    >>> nearest("xyz", ["length", "seed"])
    ''
    """
    found = difflib.get_close_matches(name, list(names), n=1)
    return f" Did you mean '{found[0]}'?" if found else ""


def misspelt(name: str, names: Iterable[str]) -> str:
    """The one of `names` that must have been meant, or "".

    It differs by two letters at most, by one where the name is short, and by no digit.

    >>> misspelt("modles/llama-3", ["models/llama-3", "data/x"])
    'models/llama-3'
    >>> misspelt("org/llama-3.2", ["org/llama-3.1", "org/llama-3.2-it"])
    ''
    """
    most = 1 if len(name) < 8 else 2
    digits = lambda text: [letter for letter in text if letter.isdigit()]  # noqa: E731
    near = [one for one in names if digits(one) == digits(name) and abs(len(one) - len(name)) <= most]
    return next(iter(difflib.get_close_matches(name, near, n=1, cutoff=1 - (most + 0.01) / max(1, len(name)))), "")
