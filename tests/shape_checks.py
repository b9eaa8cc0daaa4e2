"""The checker that conftest.py's hook calls: beartype, of the hints that say a shape or a dtype, and of no other.

What else a signature says is mypy's. A user's wrong `"ten"` must reach the sentence that names it.
"""

import inspect
from collections.abc import Callable
from typing import Any, get_args

from beartype import beartype
from jaxtyping import AbstractArray


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose arguments and result are checked at every call where it says a shape or a dtype."""
    hints = function.__annotations__
    if not any(map(says_shape, hints.values())):  # the hook asks of every function, those made at each call too
        return function
    function.__annotations__ = {name: hint if says_shape(hint) else Any for name, hint in hints.items()}
    return beartype(function)


def says_shape(hint: Any) -> bool:
    """Whether a hint has a shape or a dtype anywhere in it."""
    return inspect.isclass(hint) and issubclass(hint, AbstractArray) or any(map(says_shape, get_args(hint)))
