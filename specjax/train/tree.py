"""A pytree's leaves by names: how a checkpoint calls them, and in what two trees differ."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.tree_util as jtu

Names = tuple[str, ...]


def leaves(tree: Any, spelt: Callable[[Any], Names]) -> dict[Names, Any]:
    """A pytree's leaves, in its order, by the names that lead to them; `spelt`: those of a key."""
    found = {}
    for path, leaf in jtu.tree_flatten_with_path(tree)[0]:
        # The key of a dict, the field of a tuple with names, the index in another.
        keys = (getattr(key, "key", getattr(key, "name", getattr(key, "idx", None))) for key in path)
        found[tuple(name for key in keys for name in spelt(key))] = leaf
    return found


def as_is(key: Any) -> Names:
    """A name as it stands in a checkpoint."""
    return (str(key),)


def escaped(key: Any) -> Names:
    """A tuple is several names; Orbax joins names by dots, and files' names end at a slash."""
    parts = key if isinstance(key, tuple) else (key,)
    return tuple(str(part).replace("%", "%25").replace(".", "%2E").replace("/", "%2F") for part in parts)


def dotted(key: Any) -> Names:
    """As specjax 0.1 wrote it: a tuple is one name, and all layers were what the first segment's are now."""
    name = ".".join(map(str, key)) if isinstance(key, tuple) else str(key)
    return (name.replace("layers.0.", "layers.", 1),)


def nested(leaves: Mapping[Names, Any]) -> dict[str, Any]:
    """The leaves as dicts of dicts."""
    tree: dict[str, Any] = {}
    for (*folders, last), leaf in leaves.items():
        inner = tree
        for name in folders:
            inner = inner.setdefault(name, {})
        inner[last] = leaf
    return tree


def difference(wanted: Mapping[Names, Any], saved: Mapping[Names, Any]) -> str:
    """In what the arrays asked for differ from those that there are, in words, or ""."""
    for names in wanted.keys() - saved.keys():
        return f"it has no {'.'.join(names)}"
    for names in saved.keys() - wanted.keys():
        return f"it has {'.'.join(names)} too"
    for names, shape in wanted.items():
        if shape != tuple(saved[names]):
            return f"{'.'.join(names)} is {list(saved[names])} there and {list(shape)} here"
    return ""
