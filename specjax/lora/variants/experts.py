"""LoRA of each expert of a mixture: factors with an expert axis, multiplied by the rows of their expert alone.

How PEFT's files hold them, fused, is in `specjax.lora.fused`.

E experts, G groups of rows, R rank, L layers.
"""

from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Float32

from specjax.lora.variants.lora import LoRA
from specjax.models.experts import ExpertLinear
from specjax.models.grouped import grouped_matmul
from specjax.models.stack import Arrays, Call


class ExpertLoRA(LoRA):
    """A [(L,) E, R, in] and B [(L,) E, out, R]; without dropout, as in PEFT's `ParamWrapper`."""

    name: ClassVar[str] = "experts"
    map_class: ClassVar[type] = ExpertLinear
    settings: ClassVar[dict[str, Any]] = {}

    def apply(self, factors: Arrays, scale: Any, dropout: Any, call: Call) -> Float[Array, "M out"]:
        """The update s B_e A_e x of each row's expert; of groups [G,E,...], sizes [E,G], and of its group."""
        a, b = (factors[name].astype(call.x.dtype) for name in "ab")
        assert call.sizes is not None
        if call.sizes.ndim == 1:
            return grouped_matmul(grouped_matmul(call.x, a, call.sizes), b, call.sizes) * scale
        b = b * scale.astype(b.dtype)[:, None, None, None]
        a, b = (jnp.swapaxes(factor, 0, 1).reshape(-1, *factor.shape[2:]) for factor in (a, b))
        sizes = call.sizes.reshape(-1)
        return grouped_matmul(grouped_matmul(call.x, a, sizes), b, sizes)

    def shared(self, factors: Arrays) -> None:
        """None: rows are multiplied expert by expert."""
        return None

    def merge(
        self, kernel: Float[Array, "E out in"], factors: Arrays, scale: Any, in_dims: int
    ) -> Float32[Array, "E out in"]:
        """W + s B A of each expert."""
        product = jnp.einsum("Eor,Eri->Eoi", factors["b"], factors["a"], precision="highest")
        return kernel.astype(jnp.float32) + product * scale

    def tensors(self, in_dims: int) -> tuple[tuple[str, str, str], ...]:
        """None: PEFT has the experts of a layer in one tensor, see `specjax.lora.fused`."""
        return ()
