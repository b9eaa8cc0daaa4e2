"""Rotary positions in Hugging Face's layout: a head's two halves rotate together, nothing is interleaved.

B batch, T length, N heads, H head_dim.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Float32, Int32

Tables = tuple[Float32[Array, "B T 1 half"], Float32[Array, "B T 1 half"]]  # cosines, sines

KINDS = ("default", "linear", "llama3", "yarn", "longrope", "proportional")  # that files ask for


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary frequencies and their long-context scaling, as `transformers.modeling_rope_utils` defines them.

    Attributes:
      dim: how many of a head's dimensions rotate, the first ones; the others pass.
      theta: the base.
      kind: `none` turns nothing, whatever the position. `linear` divides every frequency by `factor`. `llama3` (Llama
        3.1) divides the low ones, keeps the high ones and blends between, measured in wavelengths against
        `original_max_positions`. `yarn` (arXiv:2309.00071) blends between dimensions. `longrope` (arXiv:2402.13753,
        Phi-3) divides each frequency by its own factor, of the short list in texts of up to `original_max_positions`
        tokens and of the long list in longer ones. `proportional` (Gemma 4) turns the first `turning` pairs alone, at
        the frequencies that they have among all.
      attention_factor: multiplies cosines and sines.
    """

    dim: int
    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    original_max_positions: int = 0
    attention_factor: float = 1.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    turning: int = 0


def frequencies(rope: Rope, *, long: bool = False) -> Float32[np.ndarray, " {rope.dim}//2"]:
    """Inverse frequencies, equal to transformers' `ROPE_INIT_FUNCTIONS`; `long`: longrope's long ones.

    Rounded to float32 where transformers rounds: one unit in the last place is already visible in the logits.
    """
    f32 = np.float32
    exponent = np.arange(0, rope.dim, 2, dtype=np.int64).astype(f32) / f32(rope.dim)
    # torch's float32 power is rounded correctly, which NumPy's is not: taken in float64 and rounded, they agree.
    power = (np.float64(rope.theta) ** exponent.astype(np.float64)).astype(f32)
    if rope.kind == "longrope":
        return f32(1.0) / (np.array(rope.long_factors if long else rope.short_factors, f32) * power)
    inverse = f32(1.0) / power
    if rope.kind == "none":
        return np.zeros_like(inverse)
    if rope.kind == "proportional":
        return np.where(np.arange(rope.dim // 2) < rope.turning, inverse, f32(0)) / f32(rope.factor)
    if rope.kind == "linear":
        return inverse / f32(rope.factor)
    if rope.kind == "llama3":
        return _llama3(rope, inverse)
    if rope.kind == "yarn":
        return _yarn(rope, power)
    return inverse


def _llama3(rope: Rope, inverse: np.ndarray) -> np.ndarray:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    f32 = np.float32
    wavelength = f32(1.0) / inverse * f32(2 * np.pi)  # torch divides by multiplying with the reciprocal
    low_wavelength = rope.original_max_positions / rope.low_freq_factor
    high_wavelength = rope.original_max_positions / rope.high_freq_factor
    turns = f32(1.0) / wavelength * f32(rope.original_max_positions)
    smooth = (turns - f32(rope.low_freq_factor)) / f32(rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - smooth) * inverse / f32(rope.factor) + smooth * inverse
    scaled = np.where(wavelength > low_wavelength, inverse / f32(rope.factor), inverse)
    between = (wavelength >= high_wavelength) & (wavelength <= low_wavelength)
    return np.where(between, blended, scaled).astype(f32)


def _yarn(rope: Rope, power: np.ndarray) -> np.ndarray:
    """Dimensions that turn often are kept, those that turn rarely divided by `factor`, those between blended."""
    f32 = np.float32

    def dimension(turns: float) -> float:
        ratio = rope.original_max_positions / (turns * 2 * math.pi)
        return rope.dim * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    high += 0.001 if low == high else 0
    ramp = np.clip((np.arange(rope.dim // 2, dtype=f32) - f32(low)) / f32(high - low), 0, 1)
    kept = 1 - ramp
    return (f32(1.0) / (f32(rope.factor) * power) * (1 - kept) + f32(1.0) / power * kept).astype(f32)


def tables(positions: Int32[Array, "B T"], rope: Rope, lengths: Int32[Array, " B #T"] | None = None) -> Tables:
    """Cosines and sines of half the dimensions that rotate.

    Args:
      positions: of the tokens.
      rope: the frequencies.
      lengths: [B,T] or [B,1], the tokens of the text that each position is in; for longrope alone.
    """
    inverse: Array | np.ndarray = frequencies(rope)[None, None, None, :]
    if rope.kind == "longrope":
        assert lengths is not None
        is_long = (lengths > rope.original_max_positions)[:, :, None, None]
        inverse = jnp.where(is_long, frequencies(rope, long=True)[None, None, None, :], inverse)
    angles = positions[:, :, None, None].astype(jnp.float32) * inverse
    factor = np.float32(rope.attention_factor)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(
    x: Float[Array, "B T N H"], cos: Float32[Array, "B T 1 half"], sin: Float32[Array, "B T 1 half"]
) -> Float[Array, "B T N H"]:
    """Rotates the first dimensions of x by the tables' angles, in x's dtype (as transformers does)."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = cos.astype(x.dtype), sin.astype(x.dtype)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def rotate_neighbours(
    x: Float[Array, "B T N H"], cos: Float32[Array, "B T 1 half"], sin: Float32[Array, "B T 1 half"]
) -> Float[Array, "B T N H"]:
    """`rotate`, of which each two dimensions that stand side by side are a pair (GLM-4)."""
    half = cos.shape[-1]
    first, second, rest = x[..., : 2 * half : 2], x[..., 1 : 2 * half : 2], x[..., 2 * half :]
    cos, sin = cos.astype(x.dtype), sin.astype(x.dtype)
    turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([turned.reshape(*x.shape[:-1], 2 * half), rest], axis=-1)


def growth(positions: Int32[Array, "B T"], beta: float, length: int) -> Float32[Array, "B T 1 1"]:
    """What queries at positions p are multiplied by: 1 + beta ln(1 + floor(p / length)), at least 1.

    Source: `get_llama_4_attn_scale` of transformers' Ministral 3.
    """
    turns = (jnp.maximum(positions, 0) // length).astype(jnp.float32)  # padding before a prompt stands below 0
    return (1 + beta * jnp.log(1 + turns))[:, :, None, None]
