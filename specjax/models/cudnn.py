"""Attention by cuDNN's kernel (NVIDIA's GPUs): memory linear in the length, but where documents need a mask.

It is reached through `jax.nn.dot_product_attention`; for rows of several documents through JAX's own module beneath it,
which takes what that does not pass on: where each document lies.

B batch, T tokens, N heads, K kv heads, H head_dim.
"""

import importlib
import importlib.util
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int32

from specjax import sharding

MOST_DOCUMENTS = 63  # in a row that is taken apart: there is room for each of them as long as the row
PACKED = "jax._src.cudnn.fused_attention_stablehlo"


def takes(q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], softcap: float | None) -> bool:
    """Whether the kernel knows this case; it is there where a GPU is, and not where one is only compiled for."""
    if sharding.platform() != "gpu" or jax.default_backend() != "gpu" or softcap is not None or q.dtype == jnp.float32:
        return False
    length, dim, generation = q.shape[1], q.shape[3], _generation()
    whole = sharding.parts("length", length) == 1 and length == k.shape[1] and length % 2 == 0
    return whole and generation >= 8 and dim % 8 == 0 and dim <= (256 if generation >= 9 else 128)


def _generation() -> int:
    """Of NVIDIA's GPU here, the first number of its compute capability: 7 is Turing, 8 Ampere, 9 Hopper; else 0."""
    hit = re.fullmatch(r"(\d+)\.\d+", str(getattr(jax.devices()[0], "compute_capability", "")))
    return int(hit[1]) if hit else 0


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    segments: Int32[Array, "B T"],
    scale: float,
    window: int | None,
    documents: int | None = None,
    implementation: Any = "cudnn",
) -> Float[Array, "B T N H"]:
    """softmax(scale * q k^T) v over the keys of the same segment that are not later and inside the window.

    One document a row needs no mask. Of several, cuDNN is told where each begins, if there are few and it can be: it
    then computes nothing between them. Else they are kept apart by a mask [B,1,T,T].

    Nothing of it is named for `remat`: its backward pass needs what it keeps to itself, and makes it again either way.

    Args:
      q: query head n reads kv head n // (N/K).
      k: of the same tokens: which are later is told by their places in the row, as in the splash kernel.
      v: of the same tokens.
      segments: numbered from 1; 0 is padding.
      scale: of the scores.
      window: a key is seen if it is less than so many places before the query; None: all.
      documents: at most so many segments in a row, with the padding behind them; None: any.
      implementation: "xla", to see off a GPU what is asked of the kernel.

    Returns:
      In q's dtype.
    """
    if window is None and documents is not None and 1 < documents <= MOST_DOCUMENTS and _packed_is_known():
        return _packed(q, k, v, segments, scale, documents)
    mask = None if documents == 1 else (segments[:, :, None] == segments[:, None, :])[:, None]
    how: dict[str, Any] = {"is_causal": True, "scale": scale, "implementation": implementation}
    local = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(q, k, v, mask=mask, local_window_size=local, **how)


def _packed_is_known() -> bool:
    """Whether it takes rows apart: on Hopper and newer; how JAX shares them out to several devices was not seen."""
    return sharding.undivided() and _generation() >= 9 and importlib.util.find_spec(PACKED) is not None


def _packed(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, scale: float, documents: int) -> jax.Array:
    """Each document by itself; `jax.nn.dot_product_attention` does not pass on what says where they lie."""
    cudnn = importlib.import_module(PACKED)
    starts, sizes = _extents(segments, documents)
    # JAX 0.11 counts where keys begin with the queries' number of heads: they are repeated to have as many.
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    lie = {"q_seqlen": sizes, "kv_seqlen": sizes, "q_offsets": starts, "kv_offsets": starts}
    found: jax.Array = cudnn.dot_product_attention(q, k, v, scale=scale, mask_type=cudnn.MaskType.CAUSAL, **lie)
    return found


def _extents(segments: jax.Array, documents: int) -> tuple[jax.Array, jax.Array]:
    """Where each document of a row begins and how long it is, int32 [B,M+1] and [B,M], then -1.

    Segments are numbered from 1, and the padding behind them is a document of its own: M is `documents` + 1.
    """
    number = jnp.arange(1, documents + 2, dtype=jnp.int32)[None]
    sizes = jnp.sum(segments[:, :, None] == number[None], axis=1, dtype=jnp.int32)
    used = jnp.sum(sizes, axis=1, keepdims=True)
    padding = jnp.where(number - 1 == jnp.max(segments, axis=1, keepdims=True), segments.shape[1] - used, 0)
    sizes = sizes + padding
    starts = jnp.where(sizes > 0, jnp.cumsum(sizes, axis=1) - sizes, -1)
    return jnp.pad(starts, ((0, 0), (0, 1)), constant_values=-1), jnp.where(sizes > 0, sizes, -1)
