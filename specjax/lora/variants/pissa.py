"""PiSSA: factors that start as the largest singular parts of W (Meng, Wang & Zhang 2024, arXiv:2404.02948).

PEFT takes these parts out of the base, and its adapter then fits that changed base alone. Here the base stays as it is:
y = W x + s (B A dropout(x) - B0 A0 x), with A0 and B0 the factors at the start, which do not train. It is the same
function. What is saved is plain LoRA of twice the rank, [A; A0] and [B, -B0], which is what PEFT's own conversion
(`path_initial_model_for_weight_conversion`) writes.

R rank, L layers.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Float32

from specjax.cluster import processes
from specjax.lora.variants.lora import LoRA, Map, Values, dropped, leading
from specjax.models.layers import Axes, Linear
from specjax.models.products import contract, expand
from specjax.models.stack import Arrays, Call


class PiSSA(LoRA):
    """LoRA with `a0` and `b0` beside its factors, in their shapes."""

    name: ClassVar[str] = "pissa"
    frozen: ClassVar[tuple[str, ...]] = ("a0", "b0")

    def arrays(self, linear: Map, rank: int) -> dict[str, tuple[tuple[int, ...], Axes]]:
        """Also A0 and B0."""
        factors = super().arrays(linear, rank)
        return factors | {"a0": factors["a"], "b0": factors["b"]}

    def start(self, linear: Linear, ranks: tuple[int, ...], scales: tuple[float, ...]) -> Values:
        """B = U sqrt(S/s) and A = sqrt(S/s) V^T of W's largest singular values, layer by layer, on the host.

        Args:
          linear: the map.
          ranks: of its layers.
          scales: s of its layers.
        """
        arrays = self.arrays(linear, max(ranks))
        if isinstance(linear.kernel[...], jax.core.Tracer):
            return {field: jnp.zeros(shape, jnp.float32) for field, (shape, _) in arrays.items()}
        values = {field: np.zeros(shape, np.float32) for field, (shape, _) in arrays.items()}
        lead = leading(linear)
        for layer, (rank, scale) in enumerate(zip(ranks, scales, strict=True)):
            if rank:
                kernel = linear.kernel[...][layer] if lead else linear.kernel[...]
                a, b = _principal(np.asarray(processes.gather(kernel), np.float32), linear.in_dims, rank, scale)
                of_layer = {field: value[layer] if lead else value for field, value in values.items()}
                of_layer["a"][:rank], of_layer["b"][..., :rank] = a, b
        return {**values, "a0": values["a"].copy(), "b0": values["b"].copy()}

    def apply(self, factors: Arrays, scale: Any, dropout: Any, call: Call) -> Float[Array, "..."]:
        """S (B A dropout(x) - B0 A0 x), in float32: what was trained is small beside both."""
        x, start = dropped(call, dropout).astype(jnp.float32), call.x.astype(jnp.float32)
        update = expand(contract(x, factors["a"], call.in_dims) * scale, factors["b"])
        update -= expand(contract(start, factors["a0"], call.in_dims) * scale, factors["b0"])
        return update.astype(call.x.dtype)

    def shared(self, factors: Arrays) -> None:
        """None: its products are in float32."""
        return None

    def merge(
        self, kernel: Float[Array, "*shape"], factors: Arrays, scale: Any, in_dims: int
    ) -> Float32[Array, "*shape"]:
        """W + s (B A - B0 A0) of one layer, [*out, *in]."""
        product = jnp.tensordot(factors["b"], factors["a"], 1, precision="highest")
        product -= jnp.tensordot(factors["b0"], factors["a0"], 1, precision="highest")
        return kernel.astype(jnp.float32) + product * scale

    def as_lora(self, values: Values, ranks: tuple[int, ...], lead: int) -> Values:
        """A and B of plain LoRA of twice the ranks, [A; A0] and [B, -B0], zeros behind the rank of each layer."""
        held = {field: np.asarray(value) for field, value in values.items()}
        rank = max(ranks)
        a, b = held["a"], held["b"]
        made = {
            "a": np.zeros((*a.shape[:lead], 2 * rank, *a.shape[lead + 1 :]), np.float32),
            "b": np.zeros((*b.shape[:-1], 2 * rank), np.float32),
        }
        for layer, r in enumerate(ranks):
            at: Any = layer if lead else ...
            new, old = made["a"][at], {field: value[at] for field, value in held.items()}
            new[:r], new[r : 2 * r] = old["a"][:r], old["a0"][:r]
            new = made["b"][at]
            new[..., :r], new[..., r : 2 * r] = old["b"][..., :r], -old["b0"][..., :r]
        return dict(made)


def _principal(kernel: np.ndarray, in_dims: int, rank: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """A [R,*in] and B [*out,R] of a kernel [*out,*in]."""
    out, inputs = kernel.shape[:-in_dims], kernel.shape[-in_dims:]
    u, s, v = np.linalg.svd(kernel.reshape(int(np.prod(out)), -1), full_matrices=False)
    root = np.sqrt(s[:rank] / np.float32(scale))
    return (root[:, None] * v[:rank]).reshape(rank, *inputs), (u[:, :rank] * root).reshape(*out, rank)
