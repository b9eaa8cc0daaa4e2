"""Several LoRA adapters made into one, in PEFT's semantics (`add_weighted_adapter`).

Of each layer of a map the update of adapter i is s_i B_i A_i; w_i is its weight. What the ways do with it:

- `cat`: the sum of w_i s_i B_i A_i itself; the new rank is the sum of the ranks.
- `svd`: the nearest update of a lower rank to that sum (Eckart and Young 1936).
- `linear`: A and B are added singly, each times sqrt(w_i s_i): near the sum only where the adapters are alike.
- `ties` (Yadav et al. 2023, arXiv:2306.01708): of each the largest numbers stay, then at each place those of the sign
  that most of the sum has, and their mean is taken.
- `dare_linear`, `dare_ties` (Yu et al. 2023, arXiv:2311.03099): numbers that are drawn stay, scaled up, in place of the
  largest ones.
- `magnitude_prune`: the largest numbers stay, and are added.

The last four go through A and B singly, as `linear` does, and with `_svd` behind the name through s_i B_i A_i.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from specjax.errors import UserError, argument, nearest
from specjax.lora import adapters
from specjax.lora.adapters import Adapter, Factors
from specjax.lora.targets import is_stacked, part
from specjax.lora.variants import LoRA
from specjax.models import Decoder

_SINGLY = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
HOW = ("cat", "svd", *_SINGLY, *(f"{way}_svd" for way in _SINGLY[1:]))

Part = tuple[float, float, np.ndarray, np.ndarray]  # of one adapter in one layer: weight, scale, A [R,I] and B [O,R]


def combine(
    model: Decoder,
    weights: Mapping[str, float],
    *,
    how: str = "svd",
    name: str = "combined",
    rank: int | None = None,
    density: float | None = None,
    majority_sign: str = "total",
    seed: int = 0,
) -> None:
    """Makes one LoRA adapter of several that the model has, and puts it in use; they stay as they are.

    A map that some of them leave alone gets the update of the others. The new adapter's scale is 1.

    Args:
      model: wears the adapters.
      weights: of each adapter by its name, also negative.
      how: one of `HOW`, see above.
      name: of the new adapter.
      rank: of the new one, where `how` is or ends in `svd`; default the largest rank of the adapters.
      density: the share of numbers that stay, in (0, 1]; needed by `ties`, `dare` and `magnitude_prune`.
      majority_sign: `ties` and `dare_ties`: the sign of the sum of the numbers ("total"), or of the sum of their signs
        ("frequency").
      seed: of what `dare` draws.

    Raises:
      UserError: an adapter that is not loaded or has more than LoRA's factors (DoRA, copies of modules, experts), ranks
        that differ where `how` adds factors singly, or an argument that is not of this `how`.
    """
    adapters.check_free(model, name)
    if how not in HOW:
        raise UserError(f"{argument('how')} is {how!r}: it is one of {', '.join(HOW)}.{nearest(how, HOW)}")
    if not weights:
        raise UserError("no adapter is named: there is nothing to combine.")
    for one, weight in weights.items():
        if not math.isfinite(weight):
            raise UserError(f"the weight of adapter {one!r} is {weight}: give a number.")
    way, svd = how.removesuffix("_svd"), how.endswith("svd")
    _check(way, svd, rank, density, majority_sign)
    found = {one: _plain(model, one) for one in weights}
    rng = np.random.default_rng(seed)

    def kept(values: np.ndarray) -> np.ndarray:
        assert density is not None
        return _drawn(values, density, rng) if way.startswith("dare") else _largest(values, density)

    def total(values: Sequence[np.ndarray], by: Sequence[float]) -> np.ndarray:
        pruned = values if density is None else [kept(one) for one in values]
        add = _of_one_sign if way.endswith("ties") else _sum
        return add(np.stack(pruned), np.asarray(by, np.float32), majority_sign)

    widest = rank or max(max(one.ranks) for adapter in found.values() for one in adapter.factors.values())
    factors = {}
    for path in dict.fromkeys(path for adapter in found.values() for path in adapter.factors):
        having = {one: adapter.factors[path] for one, adapter in found.items() if path in adapter.factors}
        example, stacked = next(iter(having.values())), is_stacked(part(model, path))
        made = []
        for layer in range(len(example.ranks)):
            parts = [
                (weights[one], held.scales(found[one].rslora)[layer], *_matrices(held, layer, stacked))
                for one, held in having.items()
                if held.ranks[layer]
            ]
            made.append(_layer(parts, way, svd, widest, total) if parts else None)
        factors[path] = _factors(example, stacked, made)
    adapters.attach(model, name, Adapter(factors, {}, 0.0, False))


def _check(way: str, svd: bool, rank: int | None, density: float | None, majority_sign: str) -> None:
    sparse = way in _SINGLY[1:]
    if sparse and density is None:
        raise UserError(f"{way} needs {argument('density')}: the share of numbers that stay, such as 0.5.")
    if density is not None and not sparse:
        raise UserError(f"{argument('density')} is of {', '.join(_SINGLY[1:])}: leave it out of {way}.")
    if density is not None and not 0 < density <= 1:
        raise UserError(f"{argument('density')} is {density}: it must be above 0 and at most 1.")
    if rank is not None and not svd:
        raise UserError(f"{argument('rank')} is of svd, and what ends in it: leave it out of {way}.")
    if rank is not None and rank < 1:
        raise UserError(f"{argument('rank')} is {rank}: it must be at least 1.")
    if majority_sign not in ("total", "frequency"):
        raise UserError(f"{argument('majority_sign')} is {majority_sign!r}: it is total or frequency.")


def _plain(model: Decoder, name: str) -> Adapter:
    """An adapter that has LoRA's factors alone, on the host."""
    adapter = adapters.on_host(adapters.collect(model, name))
    other = next((one.variant.name for one in adapter.factors.values() if type(one.variant) is not LoRA), "")
    if adapter.copies or other:
        what = f"factors of another kind ({other})" if other else "copies of whole modules, rows or biases"
        raise UserError(f"adapter {name!r} has {what}: plain LoRA factors alone can be combined.")
    return adapter


def _matrices(factors: Factors, layer: int, stacked: bool) -> tuple[np.ndarray, np.ndarray]:
    """A [R, inputs] and B [outputs, R] of one layer, cut to its rank."""
    a, b = (np.asarray(factors.values[field], np.float32) for field in ("a", "b"))
    a, b = (a[layer], b[layer]) if stacked else (a, b)
    rank = factors.ranks[layer]
    return a[:rank].reshape(rank, -1), b[..., :rank].reshape(-1, rank)


def _layer(
    parts: Sequence[Part],
    way: str,
    svd: bool,
    rank: int,
    total: Callable[[Sequence[np.ndarray], Sequence[float]], np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """The new A and B of one layer."""
    if way in ("cat", "svd"):
        a = np.concatenate([weight * scale * a for weight, scale, a, _ in parts])
        b = np.concatenate([b for *_, b in parts], axis=1)
        if way == "cat":
            return a, b
        # The sum is b @ a, whose singular values are those of a small matrix between two bases.
        (left, inner), (right, outer) = np.linalg.qr(b), np.linalg.qr(a.T)
        u, values, v = np.linalg.svd(inner @ outer.T)
        return v[:rank] @ right.T, left @ u[:, :rank] * values[:rank]
    if svd:
        updates = [scale * (b @ a) for _, scale, a, b in parts]
        u, values, v = np.linalg.svd(total(updates, [weight for weight, *_ in parts]), full_matrices=False)
        return v[:rank], u[:, :rank] * values[:rank]
    ranks = sorted({a.shape[0] for _, _, a, _ in parts})
    if len(ranks) > 1:
        raise UserError(
            f"the adapters' ranks differ ({', '.join(map(str, ranks))}), and {way} adds their factors one to one: take "
            f"{'svd' if way == 'linear' else way + '_svd'}."
        )
    roots = [math.sqrt(abs(weight * scale)) for weight, scale, *_ in parts]
    signed = [math.copysign(root, weight) for root, (weight, *_) in zip(roots, parts, strict=True)]  # the sign once
    return total([a for _, _, a, _ in parts], signed), total([b for *_, b in parts], roots)


def _factors(example: Factors, stacked: bool, made: Sequence[tuple[np.ndarray, np.ndarray] | None]) -> Factors:
    """The layers' A and B in arrays of the map's shape, padded with zeros to the largest rank."""
    ranks = tuple(0 if one is None else one[0].shape[0] for one in made)
    rank, at = max(ranks), int(stacked)
    shape_a, shape_b = example.values["a"].shape[at + 1 :], example.values["b"].shape[at:-1]
    a = np.zeros((len(made), rank, math.prod(shape_a)), np.float32)
    b = np.zeros((len(made), math.prod(shape_b), rank), np.float32)
    for layer, one in enumerate(made):
        if one is not None:
            a[layer, : ranks[layer]], b[layer, :, : ranks[layer]] = one
    a, b = a.reshape(len(made), rank, *shape_a), b.reshape(len(made), *shape_b, rank)
    values = {"a": a, "b": b} if stacked else {"a": a[0], "b": b[0]}
    return Factors(example.variant, values, ranks, tuple(float(rank) for rank in ranks))


def _largest(values: np.ndarray, density: float) -> np.ndarray:
    """The largest numbers, the rest zero."""
    flat = np.abs(values).ravel()
    left = flat.size - int(density * flat.size)
    result = values.copy().ravel()
    result[np.argpartition(flat, left - 1)[:left] if left else []] = 0
    return result.reshape(values.shape)


def _drawn(values: np.ndarray, density: float, rng: np.random.Generator) -> np.ndarray:
    """Numbers that are drawn, scaled so that the expected value stays; the rest zero."""
    if density == 1:
        return values
    return values * (rng.random(values.shape) < density).astype(np.float32) / np.float32(density)


def _sum(parts: np.ndarray, weights: np.ndarray, _: str) -> np.ndarray:
    return np.tensordot(weights, parts, 1)


def _of_one_sign(parts: np.ndarray, weights: np.ndarray, majority_sign: str) -> np.ndarray:
    """The mean of those numbers that have the majority's sign at their place."""
    counted = parts if majority_sign == "total" else np.sign(parts)
    same = np.sign(parts) == np.where(counted.sum(axis=0) >= 0, 1, -1)
    weighted = parts * weights.reshape(-1, *(1,) * (parts.ndim - 1))
    mean: np.ndarray = (weighted * same).sum(axis=0) / np.maximum(same.sum(axis=0), 1)
    return mean
