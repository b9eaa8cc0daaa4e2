"""Rotary positions in Hugging Face's layout: a head's two halves rotate together, nothing is interleaved."""

import jax
import jax.numpy as jnp
import numpy as np

from specjax.models.config import RopeScaling


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """Inverse frequencies, float32 [head_dim/2], equal to transformers' `ROPE_INIT_FUNCTIONS`.

    Rounded to float32 where transformers rounds: one unit in the last place is already visible in the logits.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.int64).astype(np.float32) / np.float32(head_dim)
    # torch's float32 power is rounded correctly, which NumPy's is not: taken in float64 and rounded, they agree.
    power = (np.float64(theta) ** exponent.astype(np.float64)).astype(np.float32)
    inverse = np.float32(1.0) / power
    if scaling is None:
        return inverse
    if scaling.kind == "linear":
        return inverse / np.float32(scaling.factor)
    # llama3: long wavelengths are stretched by `factor`, short ones kept, those between blended.
    wavelength = np.float32(1.0) / inverse * np.float32(2 * np.pi)  # torch divides by multiplying with the reciprocal
    low_wavelength = scaling.original_max_positions / scaling.low_freq_factor
    high_wavelength = scaling.original_max_positions / scaling.high_freq_factor
    turns = np.float32(1.0) / wavelength * np.float32(scaling.original_max_positions)
    smooth = (turns - np.float32(scaling.low_freq_factor)) / np.float32(
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - smooth) * inverse / np.float32(scaling.factor) + smooth * inverse
    scaled = np.where(wavelength > low_wavelength, inverse / np.float32(scaling.factor), inverse)
    between = (wavelength >= high_wavelength) & (wavelength <= low_wavelength)
    return np.where(between, blended, scaled).astype(np.float32)


def tables(positions: jax.Array, inverse: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, float32 [B,T,1,head_dim/2], of positions int32 [B,T]."""
    angles = positions[:, :, None, None].astype(jnp.float32) * inverse[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates x [B,T,N,H] by the tables' angles, in x's dtype (as transformers does)."""
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = cos.astype(x.dtype), sin.astype(x.dtype)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
