"""A model's linear maps in few bits: from float parameters, or tensor by tensor while a checkpoint is read."""

import dataclasses
import functools
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from specjax import sharding
from specjax.errors import UserError, argument
from specjax.hf import names
from specjax.hf.place import place
from specjax.hf.tensors import Tensors
from specjax.models import Decoder
from specjax.models.experts import ExpertLinear
from specjax.models.layers import Linear
from specjax.models.moe import Router
from specjax.models.quantised import Leaves, Quantised, Report, check, dequantise, lead_of, quantise


def maps(model: Decoder) -> dict[names.Path, Linear | ExpertLinear]:
    """The linear maps that are quantised, by path: those of the layers, without a router."""
    return {
        path: module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, Linear | ExpertLinear)
        and not isinstance(module, Router)
        and "layers" in module.kernel.get_metadata("axes")
    }


def convert(model: Decoder, kind: str) -> None:
    """Puts quantised kernels in the float ones' place, of a model with values or of an abstract one.

    They stand for kernels of the model's compute dtype.

    Raises:
      UserError: a map's inputs are no multiple of nf4's block, or the experts are gpt-oss'.
    """
    if model.config.clamp is not None:
        raise UserError(
            "gpt-oss' experts, nearly all of its weights, are not stored in few bits here: leave "
            f"{argument('quantise')} out."
        )
    for path, linear in maps(model).items():
        kernel, in_dims = linear.kernel, linear.in_dims
        axes = kernel.get_metadata("axes")
        check(sharding.path_name((*path, "kernel")), kernel.shape, kind, in_dims)
        run = functools.partial(quantise, kind=kind, in_dims=in_dims, lead=lead_of(axes))
        value = kernel.get_raw_value()
        leaves = jax.eval_shape(run, value) if isinstance(value, jax.ShapeDtypeStruct) else jax.jit(run)(value)
        _put(linear, Quantised(kind, leaves, axes, in_dims, model.dtype))


def _put(linear: Linear | ExpertLinear, kernel: Any) -> None:
    del linear.kernel
    linear.kernel = nnx.data(kernel)


def dequantise_base(model: Decoder) -> None:
    """Puts dequantised float kernels, of the model's compute dtype, in the quantised ones' place."""
    for path, linear in maps(model).items():
        if isinstance(old := linear.kernel, Quantised):
            mesh = sharding.mesh_of(old.codes[...])
            name = sharding.path_name((*path, "kernel"))
            layout = None if mesh is None else sharding.named_sharding(mesh, old.axes, old.shape, name)
            _put(linear, nnx.Param(floats(old, layout), axes=old.axes))
    model.origin = dataclasses.replace(model.origin, quantisation=None)


def floats(kernel: Quantised, layout: Any = None) -> jax.Array:
    """All layers of a quantised kernel, dequantised to its dtype one after another."""
    graph, state = nnx.split(kernel)

    def one(state: Any) -> jax.Array:
        value: jax.Array = nnx.merge(graph, state)[...]
        return value

    return jax.jit(lambda state: jax.lax.map(one, state), out_shardings=layout)(state)


def is_quantised(model: nnx.Module) -> bool:
    """Whether any of the model's kernels is."""
    return any(isinstance(module, Quantised) for _, module in nnx.iter_modules(model))


class Reader:
    """Fills a model's quantised kernels from a checkpoint's tensors and adds up the errors."""

    def __init__(self, mesh: Mesh | None):
        self.mesh, self.sums, self.bytes, self.parameters = mesh, {}, 0, 0  # type: ignore[var-annotated]

    def read(self, entry: names.Entry, kernel: Quantised, tensors: Tensors, pool: ThreadPoolExecutor) -> Leaves:
        """The arrays of one kernel: each tensor is placed as floats, quantised there, and put in its stack.

        Args:
          entry: the row of the float kernel.
          kernel: the abstract kernel.
          tensors: the file's.
          pool: whose threads copy.
        """
        shape, inner = kernel.shape, kernel.shape[entry.stacked :]
        where: Any = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        layouts = dict.fromkeys(kernel.leaves, where)
        if self.mesh is not None:
            told = sharding.path_name(entry.path)
            where = sharding.named_sharding(self.mesh, kernel.axes[entry.stacked :], inner, told)
            for name, leaf in kernel.leaves.items():
                axes = getattr(kernel, name).get_metadata("axes")
                layouts[name] = sharding.named_sharding(self.mesh, axes, leaf.shape, f"{told}.{name}")
        shapes = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in kernel.leaves.items()}
        stacks = jax.jit(
            lambda: {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in shapes.items()}, out_shardings=layouts
        )()
        write = _writer(kernel.kind, kernel.in_dims, tuple(sorted(layouts.items())))
        sums = []
        for at, name in entry.tensors(shape):
            part = place(dataclasses.replace(entry, hf=name), inner, _float(tensors[name].dtype), where, tensors, pool)
            stacks, errors = write(stacks, part, tuple(map(np.int32, at)))
            jax.block_until_ready(errors)  # the host holds no tensor but this one
            sums.append(errors)
            tensors.release()
        self._count(str(entry.path[-2]), kernel, sums)
        return stacks

    def _count(self, name: str, kernel: Quantised, sums: list[Any]) -> None:
        wrong, all_, largest = np.array(sums, np.float64).T
        before = self.sums.get(name, (0.0, 0.0, 0.0))  # the map's kind in another segment
        self.sums[name] = (before[0] + wrong.sum(), before[1] + all_.sum(), max(before[2], largest.max()))
        self.bytes += sum(leaf.size * leaf.dtype.itemsize for leaf in kernel.leaves.values())
        self.parameters += math.prod(kernel.shape)

    def report(self, kind: str) -> Report:
        """Of all that was read."""
        relative = tuple((name, math.sqrt(wrong / max(all_, 1e-300))) for name, (wrong, all_, _) in self.sums.items())
        largest = tuple((name, float(most)) for name, (_, _, most) in self.sums.items())
        return Report(kind, self.parameters, 8 * self.bytes / self.parameters, relative, largest)


def _float(dtype: Any) -> Any:
    return dtype if np.dtype(dtype).itemsize <= 4 else np.dtype(np.float32)


@functools.cache
def _writer(kind: str, in_dims: int, layouts: tuple[tuple[str, Any], ...]) -> Any:
    """The compiled step: (stacks, a float tensor, its place) -> (stacks, its errors)."""

    def write(stacks: Leaves, part: jax.Array, at: tuple[Any, ...]) -> tuple[Leaves, Any]:
        leaves = quantise(part, kind, in_dims)
        wide = part.astype(jnp.float32)
        wrong = wide - dequantise(leaves, kind, in_dims)
        errors = jnp.sum(wrong * wrong), jnp.sum(wide * wide), jnp.max(jnp.abs(wrong))
        for name, leaf in leaves.items():
            starts = (*at, *(0 for _ in leaf.shape))
            new = jnp.expand_dims(leaf, range(len(at)))
            stacks = stacks | {name: jax.lax.dynamic_update_slice(stacks[name], new, starts)}
        return stacks, errors

    return jax.jit(write, donate_argnums=0, out_shardings=(dict(layouts), None))
