"""A user's mistake, as opposed to a bug of ours."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake that the user can mend, told in one sentence: what, where (file:line, key, tensor), what to do.

    The command line prints the sentence on stderr and exits with status 2; a bug of ours keeps its traceback.
    """


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint that names the nearest of `names`, or nothing.

    >>> nearest("lenght", ["length", "seed"])
    " Did you mean 'length'?"
    >>> nearest("xyz", ["length", "seed"])
    ''
    """
    found = difflib.get_close_matches(name, list(names), n=1)
    return f" Did you mean '{found[0]}'?" if found else ""
