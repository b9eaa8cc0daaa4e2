"""Devices: the mesh, the one table from logical axes to mesh axes, and where each parameter lies.

Sharding is a layout, not an algorithm: a parameter split over `fsdp` is gathered by XLA where a layer needs it
(ZeRO-3), one split over `tensor` stays split through its layer (Megatron), and one split over `expert` is used where it
lies: the tokens come to it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from specjax.errors import UserError, argument

# Outermost first: neighbours on the last axes are neighbours in the machine.
MESH_AXES = ("data", "fsdp", "expert", "context", "tensor")

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "length": ("context",),
    "residual": ("context", "tensor"),  # the length between blocks, where no map is split over `tensor`
    "cache_length": (),
    "loss_batch": ("data", "expert"),  # of logits, whose vocabulary takes the devices of `fsdp` too
    "loss_vocab": ("tensor", "fsdp"),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "layers": (),
    "adapter": (),
    "lora_rank": (),
    "expert": ("expert",),
}


def make_mesh(
    *,
    data: int = 1,
    fsdp: int = -1,
    expert: int = 1,
    context: int = 1,
    tensor: int = 1,
    devices: list[Any] | None = None,
) -> Mesh:
    """A mesh of all devices.

    Args:
      data: copies of the model, each on its own rows (across slices of a pod).
      fsdp: ways in which parameters, optimizer and rows are split; -1 takes the devices that are left.
      expert: ways in which the experts of a mixture-of-experts model, and rows, are split; -1 as above.
      context: ways in which the length of each row is split, for rows too long for one device; -1 as above.
      tensor: ways in which heads, MLP and vocabulary are split; -1 as above.
      devices: default `jax.devices()`.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = fill_sizes(
        {"data": data, "fsdp": fsdp, "expert": expert, "context": context, "tensor": tensor}, len(devices)
    )
    # Auto axes: XLA propagates layouts between our constraints. Explicit axes raise on contractions it could settle.
    return Mesh(_arranged(tuple(sizes.values()), devices), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _arranged(shape: tuple[int, ...], devices: list[Any]) -> np.ndarray:
    """The devices in the mesh's shape, so that neighbours in the mesh are neighbours by link; slices along `data`."""
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if shape[0] % slices:
        raise UserError(
            f"mesh data {shape[0]} on {slices} slices: between slices there is the slow network, so set "
            f"{argument('data')} to a multiple of {slices}."
        )
    within, between = (shape[0] // slices, *shape[1:]), (slices, *(1 for _ in shape[1:]))
    return mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)


def fill_sizes(sizes: dict[str, int], device_count: int) -> dict[str, int]:
    """Replaces one -1 by what is left of the devices.

    >>> fill_sizes({"data": 1, "fsdp": -1, "tensor": 2}, 8)
    {'data': 1, 'fsdp': 4, 'tensor': 2}

    Raises:
      UserError: two -1, a size below 1, or a product other than the number of devices.
    """
    shown = " x ".join(f"{name} {size}" for name, size in sizes.items())
    free = [name for name, size in sizes.items() if size == -1]
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    if len(free) > 1 or fixed < 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(f"mesh {shown}: every size must be at least 1, or -1 for one of them.")
    if device_count % fixed if free else fixed != device_count:
        chosen = ", ".join(argument(name) for name, size in sizes.items() if size > 1) or argument("fsdp")
        raise UserError(f"mesh {shown} does not fit {device_count} devices: change {chosen}.")
    return {name: device_count // fixed if size == -1 else size for name, size in sizes.items()}


def partition_spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """The mesh axes of each of a tensor's logical axes.

    >>> tuple(partition_spec(("layers", "embed", "heads", "head_dim")))
    (None, 'fsdp', 'tensor', None)
    """
    entries: list[Any] = []
    for axis in axes:
        names = RULES[axis] if axis is not None else ()
        entries.append(names if len(names) > 1 else names[0] if names else None)
    return PartitionSpec(*entries)


def named_sharding(mesh: Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...], name: str) -> NamedSharding:
    """Where a tensor with these logical axes lies.

    Raises:
      UserError: a size is not divisible by the mesh axes that split it; both numbers are named.
    """
    spec = partition_spec(axes)
    for axis, size, entry in zip(axes, shape, spec, strict=True):
        names: tuple[str, ...] = (entry,) if isinstance(entry, str) else tuple(entry or ())
        if size % ways(mesh, entry):
            raise UserError(
                f"{name}: its axis '{axis}' of size {size} cannot be split {ways(mesh, entry)} ways over mesh axis "
                f"{' x '.join(names)}: choose a size of {argument(names[-1])} that divides {size}."
            )
    return NamedSharding(mesh, spec)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Fixes the layout of an activation inside a compiled step; without a mesh in context it is x.

    An axis that does not divide is left whole: it is a layout, not a promise (one token that is being generated).
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    spec = partition_spec(axes)
    kept = [None if size % ways(mesh, entry) else entry for size, entry in zip(x.shape, spec, strict=True)]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*kept))


def ways(mesh: Any, entry: Any) -> int:
    """Into how many parts one entry of a PartitionSpec cuts."""
    names = (entry,) if isinstance(entry, str) else tuple(entry or ())
    return int(np.prod([mesh.shape[name] for name in names]))


def parts(axis: str, size: int) -> int:
    """Into how many parts the mesh in context cuts an activation's axis of this size: 1 where it does not divide."""
    mesh = jax.sharding.get_abstract_mesh()
    count = 1 if mesh.empty else ways(mesh, RULES[axis])
    return 1 if size % count else count


def undivided() -> bool:
    """Whether the program in hand is for one device: no mesh in context, or one of a single device."""
    mesh = jax.sharding.get_abstract_mesh()
    return bool(mesh.empty) or mesh.size == 1


def platform() -> str:
    """What the program in hand is for, "cpu", "gpu" or "tpu": the mesh's devices, which need not be here."""
    mesh = jax.sharding.get_abstract_mesh()
    known = None if mesh.empty else mesh.abstract_device
    return jax.default_backend() if known is None else str(known.platform)


def cut(x: jax.Array, size: int, parts: int, axis: int = 1) -> jax.Array:
    """[..., T, ...] -> [T/(size*parts), ..., size*parts, ...]: chunks that take `size` of each of the parts of `axis`.

    The parts are those that lie on different devices, so that each chunk lies on all of them and a scan over chunks
    moves nothing.
    """
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    split = jnp.moveaxis(x.reshape(*before, parts, -1, size, *after), axis + 1, 0)
    return split.reshape(-1, *before, parts * size, *after)


def uncut(chunks: jax.Array, parts: int, axis: int = 1) -> jax.Array:
    """The inverse of `cut`."""
    count, *before = chunks.shape[: axis + 1]
    size, *after = chunks.shape[axis + 1 :]
    split = jnp.moveaxis(chunks.reshape(count, *before, parts, size // parts, *after), 0, axis + 1)
    return split.reshape(*before, count * size, *after)


def path_name(path: tuple[Any, ...]) -> str:
    """'layers.0.self_attn.q_proj.kernel' of an NNX path: the first segment's."""
    return ".".join(str(part) for part in path)


def seed_name(path: tuple[Any, ...]) -> str:
    """What a draw for a parameter or module is keyed by: its dotted path, without the number of the first segment.

    >>> seed_name(("layers", 0, "mlp", "up_proj")), seed_name(("layers", 1, "mlp", "up_proj"))
    ('layers.mlp.up_proj', 'layers.1.mlp.up_proj')
    """
    return path_name(tuple(part for part in path if part != 0))


def of_module(module: nnx.Module, mesh: Mesh) -> dict[tuple[Any, ...], NamedSharding]:
    """The sharding of every parameter and constant of a (possibly abstract) module, by NNX path."""
    state = nnx.to_flat_state(nnx.state(module))
    return {
        path: named_sharding(mesh, param.get_metadata("axes"), param.shape, path_name(path)) for path, param in state
    }


def mesh_of(array: Any) -> Mesh | None:
    """The mesh an array lies on, or None."""
    place = getattr(array, "sharding", None)
    mesh = place.mesh if isinstance(place, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) else None


def held_rows(mesh: Mesh | None, rows: int) -> np.ndarray:
    """Which rows of a batch this process's devices hold, in order: all, without a mesh.

    Raises:
      UserError: the rows do not divide over the mesh.
    """
    if mesh is None:
        return np.arange(rows)
    place = named_sharding(mesh, ("batch",), (rows,), "the batch")
    parts = place.addressable_devices_indices_map((rows,)).values()
    held = {part[0].indices(rows)[:2] for part in parts if part is not None}
    return np.concatenate([np.arange(*bounds) for bounds in sorted(held)])


def put_batch(
    batch: dict[str, np.ndarray], mesh: Mesh | None, rows: int, lead: tuple[str | None, ...] = ()
) -> dict[str, jax.Array]:
    """Places a batch, of which each process has the rows that its devices hold.

    Args:
      batch: [*lead,b,T] arrays: this process's rows, those of `held_rows`, in their order.
      mesh: where to; None: the default device.
      rows: of the whole batch, all processes together.
      lead: logical axes before the rows.
    """
    if mesh is None:
        return {name: jax.device_put(held) for name, held in batch.items()}
    mine, axes = held_rows(mesh, rows), (*lead, "batch", "length")

    def place(name: str, held: np.ndarray) -> jax.Array:
        shape = (*held.shape[:-2], rows, held.shape[-1])

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            start, stop, _ = index[-2].indices(rows)
            start, stop = np.searchsorted(mine, (start, stop))
            return held[(*index[:-2], slice(start, stop), index[-1])]

        return jax.make_array_from_callback(shape, named_sharding(mesh, axes, shape, name), part)

    return {name: place(name, held) for name, held in batch.items()}
