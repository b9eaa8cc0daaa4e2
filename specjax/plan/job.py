"""A config's training step and its arguments as shapes: what `train` compiles, without weights, data or devices."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from specjax import build, sharding
from specjax.config import check_length, settled
from specjax.config.checks import ARGUMENTS
from specjax.config.entries import slots_of
from specjax.data.loader import COLUMNS
from specjax.errors import keys, naming
from specjax.fleet import job as fleet_job
from specjax.fleet import slots as slots_lib
from specjax.fleet import step as fleet_step
from specjax.fleet.member import check_base
from specjax.hf import folder as hf_folder
from specjax.models import Decoder
from specjax.train import step as steps_lib
from specjax.train.dpo import reading_reference
from specjax.train.objective import Objective


@dataclasses.dataclass
class Job:
    """What a step takes: `jax.ShapeDtypeStruct` with shardings, by path, and the program before compilation.

    Attributes:
      mesh: of the target's devices.
      model: abstract.
      trainable: float32.
      opt_state: the optimizer's.
      frozen: in the compute dtype.
      batch: [k,b,T], of a fleet with the rows of all slots.
      lowered: the step.
      options: of the compiler.
      slots: adapters that train at once; 0: it is no fleet.
      best: what lies beside the step: of a fleet with evaluations, each slot's parameters at its best one.
    """

    mesh: Mesh
    model: Decoder
    trainable: Any
    opt_state: Any
    frozen: Any
    batch: Any
    lowered: Any
    options: dict[str, Any]
    slots: int = 0
    best: Any = ()


@keys(ARGUMENTS)
def make(config: ConfigDict, devices: list[Any]) -> Job:
    """The job of a validated config on these devices.

    Raises:
      UserError: the mesh does not fit the devices or the model, LoRA's targets match nothing, or the like.
    """
    config = settled(config, devices[0].platform, len(devices))
    mesh = sharding.make_mesh(**config.mesh, devices=devices)
    folder = hf_folder.resolve(config.model.path, config.model.revision, weights=False)
    if config.fleet:
        return _fleet(config, mesh, folder)
    model = build.model_of(config, folder, None, abstract=True)
    sizes = model.config
    check_length(config.data.length, sizes.max_positions)
    graph, trainable, frozen = nnx.split(model, build.filter_of(config), ...)
    trainable, frozen = _placed(trainable, mesh, "float32"), _placed(frozen, mesh)
    optimizer = build.optimizer_of(config, steps=1000)  # how many there are changes nothing of a step
    steps_lib.check_host_memory(devices[0].platform, model.remat, optimizer)
    shapes = jax.eval_shape(optimizer.init, trainable)
    opt_state = jax.tree.map(_struct, shapes, steps_lib.opt_shardings(optimizer, trainable, mesh))
    objective = build.objective_of(config)
    if config.objective == "dpo" and config.trainable == "all":
        objective = reading_reference(objective)
    batch = _batch(config, mesh, objective, config.batch_size)
    step = steps_lib.make_train_step(graph, optimizer, objective, seed=config.seed)
    count: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    with jax.set_mesh(mesh):
        lowered = steps_lib.lower(step, steps_lib.TrainState(trainable, opt_state, count), frozen, batch)
    options = steps_lib.compiler_options(devices[0].platform, model.dtype, sizes.num_experts)
    return Job(mesh, model, trainable, opt_state, frozen, batch, lowered, options)


def _fleet(config: ConfigDict, mesh: Mesh, folder: Path) -> Job:
    """The job of a config with `fleet`: the step of all slots over an abstract base."""
    platform, configs = mesh.devices.flat[0].platform, fleet_job.configs_of(config)
    base = build.base_of(config, folder, None, abstract=True)
    check_length(config.data.length, base.config.max_positions)
    check_base(base)
    outlines = []
    for name, one in configs.items():
        with naming(f"config.fleet.{name}"):
            drawn = partial(slots_lib.fresh, settings=fleet_job.adapter_of(one))
            nnx.eval_shape(lambda model, drawn=drawn: outlines.append(slots_lib.outline(drawn(model))), base)
    count = slots_of(config)
    model = slots_lib.Slots(base, outlines, count, mesh).model
    graph, trainable, frozen = nnx.split(model, build.filter_of(config), ...)
    trainable, frozen = _placed(trainable, mesh, "float32"), _placed(frozen, mesh)
    axes, rule = steps_lib.group_axes(model, trainable, count), fleet_job.rule_of(config)
    state = fleet_step.shapes(rule, trainable, axes, count, mesh)
    objective = build.objective_of(config)
    batch = _batch(config, mesh, objective, count * config.batch_size)
    step = fleet_step.make_fleet_step(graph, rule, objective, count)
    with jax.set_mesh(mesh):
        lowered = steps_lib.lower(step, state, frozen, batch, fleet_step.Told.shapes(count))
    options = steps_lib.compiler_options(platform, model.dtype)
    evaluates = any(one.data.eval or one.data.eval_fraction for one in configs.values())
    best = trainable if evaluates else ()
    return Job(mesh, model, trainable, state.opt_state, frozen, batch, lowered, options, count, best)


def _batch(config: ConfigDict, mesh: Mesh, objective: Objective, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The objective's columns, of so many rows in all micro-batches."""
    shape = (config.accumulate, rows // config.accumulate, config.data.length)
    place = NamedSharding(mesh, sharding.partition_spec((None, "batch", "length")))
    return {
        name: jax.ShapeDtypeStruct(shape, jnp.dtype(COLUMNS.get(name, "float32")), sharding=place)
        for name in objective.columns
    }


def _placed(state: Any, mesh: Mesh, dtype: Any = None) -> dict[Any, Any]:
    """The leaves by path, `jax.ShapeDtypeStruct` with their shardings."""
    found = {}
    for path, leaf in nnx.to_flat_state(state):
        axes = leaf.get_metadata("axes") if isinstance(leaf, nnx.Param) else (None,) * len(leaf.shape)
        own = getattr(leaf.get_value(), "sharding", None)  # of a slot's factors, which no axis alone tells
        place = own or sharding.named_sharding(mesh, axes, leaf.shape, sharding.path_name(path))
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
