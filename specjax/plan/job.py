"""A config's training step and its arguments as shapes: what `train` compiles, without weights, data or devices."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from specjax import build, sharding
from specjax.config import check_length, settled
from specjax.config.checks import ARGUMENTS
from specjax.data.loader import COLUMNS
from specjax.errors import keys
from specjax.hf import folder as hf_folder
from specjax.models import Decoder
from specjax.train import step as steps_lib
from specjax.train.dpo import reading_reference


@dataclasses.dataclass
class Job:
    """What a step takes: `jax.ShapeDtypeStruct` with shardings, by path, and the program before compilation.

    Attributes:
      mesh: of the target's devices.
      model: abstract.
      trainable: float32.
      opt_state: the optimizer's.
      frozen: in the compute dtype.
      batch: [k,b,T].
      lowered: the step.
      options: of the compiler.
    """

    mesh: Mesh
    model: Decoder
    trainable: Any
    opt_state: Any
    frozen: Any
    batch: Any
    lowered: Any
    options: dict[str, Any]


@keys(ARGUMENTS)
def make(config: ConfigDict, devices: list[Any]) -> Job:
    """The job of a validated config on these devices.

    Raises:
      UserError: the mesh does not fit the devices or the model, LoRA's targets match nothing, or the like.
    """
    config = settled(config, devices[0].platform, len(devices))
    mesh = sharding.make_mesh(**config.mesh, devices=devices)
    folder = hf_folder.resolve(config.model.path, config.model.revision, weights=False)
    model = build.model_of(config, folder, None, abstract=True)
    sizes = model.config
    check_length(config.data.length, sizes.max_positions)
    graph, trainable, frozen = nnx.split(model, build.filter_of(config), ...)
    trainable, frozen = _placed(trainable, mesh, "float32"), _placed(frozen, mesh)
    optimizer = build.optimizer_of(config, steps=1000)  # how many there are changes nothing of a step
    steps_lib.check_host_memory(devices[0].platform, model.remat, optimizer)
    shapes = jax.eval_shape(optimizer.init, trainable)
    opt_state = jax.tree.map(_struct, shapes, steps_lib.opt_shardings(optimizer, trainable, mesh))
    rows = (config.accumulate, config.batch_size // config.accumulate, config.data.length)
    place = NamedSharding(mesh, sharding.partition_spec((None, "batch", "length")))
    objective = build.objective_of(config)
    if config.objective == "dpo" and config.trainable == "all":
        objective = reading_reference(objective)
    batch = {
        name: jax.ShapeDtypeStruct(rows, jnp.dtype(COLUMNS.get(name, "float32")), sharding=place)
        for name in objective.columns
    }
    step = steps_lib.make_train_step(graph, optimizer, objective, seed=config.seed)
    count: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    with jax.set_mesh(mesh):
        lowered = steps_lib.lower(step, steps_lib.TrainState(trainable, opt_state, count), frozen, batch)
    options = steps_lib.compiler_options(devices[0].platform, model.dtype, sizes.num_experts)
    return Job(mesh, model, trainable, opt_state, frozen, batch, lowered, options)


def _placed(state: Any, mesh: Mesh, dtype: Any = None) -> dict[Any, Any]:
    """The leaves by path, `jax.ShapeDtypeStruct` with their shardings."""
    found = {}
    for path, leaf in nnx.to_flat_state(state):
        axes = leaf.get_metadata("axes") if isinstance(leaf, nnx.Param) else (None,) * len(leaf.shape)
        place = sharding.named_sharding(mesh, axes, leaf.shape, sharding.path_name(path))
        found[path] = jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype or leaf.dtype), sharding=place)
    return found


def _struct(shape: Any, place: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place)


def device_bytes(tree: Any, *, host: bool = False) -> int:
    """What one device holds of some placed shapes, or (`host`) what waits for it in the host's memory."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        if (leaf.sharding.memory_kind == "pinned_host") != host:
            continue
        shape = leaf.sharding.shard_shape(leaf.shape)
        size = leaf.dtype.itemsize
        for n in shape:
            size *= n
        total += size
    return total
