"""A fleet's state and what surrounds it: slots, the compiled step, batches, evaluations, checkpoints."""

import copy
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from specjax import flops, lora, process, sharding
from specjax.errors import UserError, naming
from specjax.fleet import slots as slots_lib
from specjax.fleet import step as fleet_step
from specjax.fleet.member import PAUSED, TRAINING, WAITING, Lane, Member, checked
from specjax.fleet.step import Rule, Told
from specjax.lora.adapters import Adapter
from specjax.models import Decoder
from specjax.train import memory
from specjax.train import step as steps_lib
from specjax.train.evaluate import evaluate, most_documents
from specjax.train.objective import Objective
from specjax.train.session import aside
from specjax.train.throughput import Throughput


class Fleet:
    """The live state of one `fleet.fit` and what surrounds it; a context manager.

    Attributes:
      lanes: by name, in the order in which they take slots.
      placed: the lane in each slot, or None.
      held: what lanes without a slot need to continue, by name.
      tick: steps of the fleet.
      steps_done: of all adapters.
      tokens: of all adapters' steps.
      clock: of training time.
      compile_seconds: of the training step.
    """

    def __init__(
        self,
        base: Decoder,
        members: Mapping[str, Member],
        rule: Rule,
        objective: Objective,
        *,
        slots: int,
        accumulate: int,
        rungs: Sequence[float] = (),
    ):
        self.base, self.rule, self.accumulate = base, rule, accumulate
        self.objective, members = checked(base, objective, members, accumulate)
        self.count = min(slots or len(members), len(members))
        self._drawn: dict[str, Adapter] = {}
        self.lanes: dict[str, Lane] = {}
        for number, (name, member) in enumerate(members.items()):
            with naming(f"adapter {name}"):
                adapter = slots_lib.fresh(base, member.lora)
                self.lanes[name] = Lane.of(name, member, slots_lib.outline(adapter), rungs)
                sizes = (value.size for one in adapter.factors.values() for value in one.values.values())
                self.lanes[name].result.trainable_parameters = sum(map(int, sizes))
            if number < self.count:
                self._drawn[name] = adapter
        self.placed: list[Lane | None] = [None] * self.count
        self.held: dict[str, Any] = {}
        self.slots = slots_lib.Slots(base, [lane.outline for lane in self.lanes.values()], self.count)
        self.mesh = sharding.mesh_of(jax.tree.leaves(nnx.state(base))[0])
        first = next(iter(members.values())).data
        self.rows = first.batch_size // accumulate
        self._lay_out()
        self._length = first.length
        self.tick = self.steps_done = self.tokens = 0
        self.compile_seconds = 0.0
        self._compiled: Any = None
        self._next: tuple[Any, Future[Any]] | None = None
        device = self.mesh.devices.flat[0] if self.mesh is not None else jax.devices()[0]
        self._device = device
        self.clock = Throughput(1 if self.mesh is None else self.mesh.size, device.device_kind)
        self._prepare()

    def _lay_out(self) -> None:
        """Checks that the rows of all adapters divide over the mesh, and makes the rows of evaluations divide.

        Batches of a set have as many rows as in a single run, or N times as many if the mesh needs it. Sums are equal.
        """
        ways = 1 if self.mesh is None else sharding.ways(self.mesh, sharding.RULES["batch"])
        if self.count * self.rows % ways:
            raise UserError(
                f"{self.count} adapters of {self.rows} rows in a micro-batch do not divide over {ways} groups of "
                "devices: make one of them a multiple of that."
            )
        for lane in self.lanes.values():
            sets = {name: copy.copy(data) for name, data in lane.member.eval_data.items()}
            for data in sets.values():
                if data.batch_size % ways:
                    data.batch_size = self.count * self.rows
            lane.member = dataclasses.replace(lane.member, eval_data=sets)

    def _prepare(self) -> None:
        """The state's shapes and places, and the small programs around the step."""
        graph, trainable, self._frozen = steps_lib.split(self.slots.model, lora.LORA)
        self._view_graph, view, self._view_frozen = steps_lib.split(self.slots.view, lora.LORA)
        model = steps_lib.merge(graph, trainable, self._frozen)
        self._axes = axes = steps_lib.group_axes(model, trainable, self.count)
        self._trainable = trainable
        sets = {f"{lane.name}/{n}": d for lane in self.lanes.values() for n, d in lane.member.eval_data.items()}
        self._evaluates = bool(sets)
        documents = most_documents({name: lane.member.data for name, lane in self.lanes.items()})
        self._step = fleet_step.make_fleet_step(graph, self.rule, self.objective, self.count, documents=documents)
        self._eval_step = jax.jit(
            steps_lib.make_eval_step(self._view_graph, self.objective, documents=most_documents(sets))
        )
        places = {path: leaf.sharding for path, leaf in view.items()}
        self._take = jax.jit(partial(fleet_step.taken, axes=axes), out_shardings=places)
        self._held = jax.jit(partial(fleet_step.held, axes=axes))
        self._held_best = jax.jit(partial(fleet_step.taken, axes=axes))
        self._put_best = jax.jit(partial(fleet_step.put_best, axes=axes), donate_argnums=0)
        self._finite = jax.jit(partial(fleet_step.finite, axes=axes))

        def better(best: Any, now: Any, chosen: Any) -> Any:
            return {path: fleet_step.chosen(chosen, now[path], best[path], axes[path]) for path in best}

        self._better = jax.jit(better, donate_argnums=0)

    def __enter__(self) -> "Fleet":
        with ExitStack() as stack:
            if self.mesh is not None:
                stack.enter_context(jax.set_mesh(self.mesh))
            self._pool = stack.enter_context(ThreadPoolExecutor(1))
            trainable = self._trainable
            del self._trainable
            begin = partial(fleet_step.begin, self.rule, axes=self._axes, count=self.count)
            shapes = fleet_step.shapes(self.rule, trainable, self._axes, self.count, self.mesh)
            places = jax.tree.map(lambda leaf: leaf.sharding, shapes)
            self.state = jax.jit(begin, out_shardings=places, donate_argnums=0)(trainable)
            self._put = jax.jit(partial(fleet_step.put, axes=self._axes), donate_argnums=0, out_shardings=places)
            self._put_back = jax.jit(
                partial(fleet_step.put_back, axes=self._axes), donate_argnums=0, out_shardings=places
            )
            self.best = jax.tree.map(jnp.zeros_like, self.state.trainable) if self._evaluates else None
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._stack.__exit__(kind, error, trace)
        if error is not None and memory.exhausted(error):
            raise memory.too_much(error, self._device, self._compiled, slots=self.count) from error

    def training(self) -> list[Lane]:
        """The lanes that have a slot."""
        return [lane for lane in self.placed if lane is not None]

    def waiting(self) -> list[Lane]:
        """Those that have not begun."""
        return [lane for lane in self.lanes.values() if lane.status == WAITING]

    def fill(self) -> list[Lane]:
        """Puts waiting lanes into free slots, and returns them."""
        begun = []
        for slot, lane in zip([i for i, one in enumerate(self.placed) if one is None], self.waiting(), strict=False):
            if lane.name in self.held:
                state, best = self.held.pop(lane.name)
                self.state = self._put_back(self.state, np.int32(slot), state)
                self.best = self._put_best(self.best, np.int32(slot), best)
            else:
                drawn = self._drawn.pop(lane.name, None)
                adapter = slots_lib.fresh(self.base, lane.member.lora) if drawn is None else drawn
                self.state = self._put(self.state, np.int32(slot), self.slots.padded(adapter))
            lane.status, self.placed[slot] = TRAINING, lane
            begun.append(lane)
        if begun:
            self._settle()
        return begun

    def _settle(self) -> None:
        """Sets the scales and rates of the adapters that are in the slots now."""
        outlines = [None if lane is None else lane.outline for lane in self.placed]
        self._frozen = self.slots.frozen(self._frozen, outlines)

    def pause(self, lane: Lane) -> None:
        """Takes a lane out of its slot, with everything that it needs to continue in any slot."""
        self.held[lane.name] = self._hold(lane)
        lane.status = PAUSED
        self.free(lane)

    def _hold(self, lane: Lane) -> Any:
        slot = np.int32(self.placed.index(lane))
        return self._held(self.state, slot), self._held_best(self.best, slot)

    def free(self, lane: Lane) -> None:
        """Takes a lane out of its slot."""
        self.placed[self.placed.index(lane)] = None

    def _told(self) -> Told:
        lanes = [(lane, lane.step) if lane is not None else None for lane in self.placed]
        of = lambda get, empty, kind: np.array([empty if one is None else get(*one) for one in lanes], kind)  # noqa: E731
        return Told(
            number=of(lambda lane, step: step, -1, np.int32),
            keys=of(lambda lane, step: lane.keys, np.zeros(2, np.uint32), np.uint32),
            rate=of(lambda lane, step: lane.rates[step], 0.0, np.float32),
            decay=of(lambda lane, step: lane.member.weight_decay, 0.0, np.float32),
            clip=of(lambda lane, step: lane.member.clip_norm, 0.0, np.float32),
        )

    def _batch(self, chosen: tuple[tuple[str, int] | None, ...]) -> Any:
        """The rows of each slot's step, [k,N*b,T], on the devices; an empty slot has padding."""
        parts: list[dict[str, np.ndarray] | None] = []
        for one in chosen:
            data = None if one is None else self.lanes[one[0]].member.data
            held = None if data is None or one is None else data.micro_batches(one[1], self.accumulate)
            parts.append(None if held is None else {name: held[name] for name in self.objective.columns})
        some = next(part for part in parts if part is not None)
        empty = {name: np.zeros_like(values) for name, values in some.items()}
        whole = {name: np.concatenate([(part or empty)[name] for part in parts], axis=1) for name in some}
        rows = self.count * self.rows
        return sharding.put_batch(whole, self.mesh, rows, lead=(None,))

    def step(self, begun: Callable[[], None]) -> tuple[list[tuple[Lane, int]], dict[str, Any]]:
        """One step of every lane in a slot: ((lane, slot) of each, metrics [N] on the devices).

        `tokens` in the metrics holds, for each of these lanes, its steps and tokens so far.
        """
        began = time.perf_counter()
        chosen = tuple(None if lane is None else (lane.name, lane.step) for lane in self.placed)
        made = self._next[1] if self._next is not None and self._next[0] == chosen else None
        batch = made.result() if made is not None else self._batch(chosen)
        data_seconds = time.perf_counter() - began
        told = self._told()
        if self._compiled is None:
            with self.clock.paused():
                self._compiled = self._compile(batch, told)
        begun()
        self.state, metrics = self._compiled(self.state, self._frozen, batch, told)
        stepped = [(lane, slot) for slot, lane in enumerate(self.placed) if lane is not None]
        done = []
        for lane, _ in stepped:
            tokens = lane.member.data.tokens_in(lane.step)
            lane.step, lane.tokens = lane.step + 1, lane.tokens + tokens
            lane.result.step, lane.result.tokens = lane.step, lane.result.tokens + tokens
            lane.result.data_seconds += data_seconds
            self.tokens += tokens
            done.append((lane.step, lane.tokens))
        self.tick, self.steps_done = self.tick + 1, self.steps_done + len(stepped)
        after = tuple(None if lane is None or lane.done else (lane.name, lane.step) for lane in self.placed)
        if any(after):
            self._next = (after, self._pool.submit(self._batch, after))
        return stepped, metrics | {"tokens": done}

    def _compile(self, batch: Any, told: Told) -> Any:
        began = time.perf_counter()
        lowered = steps_lib.lower(self._step, self.state, self._frozen, batch, told)
        options = steps_lib.compiler_options(self._device.platform, self.base.dtype, self.base.config.num_experts)
        one = self._take(self.state.trainable, np.int32(0))
        self.clock.flops_per_token = flops.of_step(self.slots.view, one, rows=1, length=self._length) / self._length
        compiled = aside(partial(lowered.compile, compiler_options=options))
        process.return_freed_memory()
        self.compile_seconds = time.perf_counter() - began
        return compiled

    def window(self) -> dict[str, Any]:
        """Tokens per second of the whole fleet since the last call with new tokens."""
        if self.tokens != self.clock._tokens:
            self._rate = self.clock.window(self.tokens)
        return self._rate

    def rows_of(self, lane: Lane, step: int, most: int = 16) -> str:
        """The numbers of the rows of a step, in words."""
        rows = sorted(lane.member.data.row_ids(step).tolist())
        return ", ".join(map(str, rows[:most])) + (f" and {len(rows) - most} more" if len(rows) > most else "")

    def broken(self) -> list[Lane]:
        """The lanes whose weights are not finite."""
        good = np.asarray(self._finite(self.state.trainable))
        return [lane for slot, lane in enumerate(self.placed) if lane is not None and not good[slot]]

    def _view(self, lane: Lane, params: Any) -> tuple[Any, Any]:
        """The view's (trained, other) parameters, with the lane's slot of the given parameters."""
        slot = self.placed.index(lane)
        return self._take(params, np.int32(slot)), self.slots.frozen(self._view_frozen, [lane.outline])

    def model_of(self, lane: Lane) -> Decoder:
        """The base with one adapter attached, with its current weights."""
        return steps_lib.merge(self._view_graph, *self._view(lane, self.state.trainable))

    def evaluate(self, lane: Lane) -> dict[str, dict[str, float]]:
        """The objective's values on the lane's sets, by name, and the numbers of its `measure`."""
        with self.clock.paused():
            params, frozen = self._view(lane, self.state.trainable)
            options: dict[str, Any] = {"objective": self.objective, "batches": lane.member.eval_batches}
            found = {
                name: evaluate(self._eval_step, params, frozen, data, self.mesh, **options)
                for name, data in lane.member.eval_data.items()
            }
            if lane.member.measure:
                for name, numbers in lane.member.measure(self.model_of(lane)).items():
                    found[name] |= numbers
        return found

    def keep_best(self, lane: Lane) -> None:
        """Keeps the lane's weights as its best."""
        self.best = self._better(self.best, self.state.trainable, np.array([one is lane for one in self.placed]))

    def end(self, lane: Lane) -> tuple[Adapter, Adapter]:
        """A lane's last weights, and those of its best evaluation (without evaluations, the last again)."""
        slot = np.int32(self.placed.index(lane))
        with self.clock.paused():
            last = self.slots.adapter(self._take(self.state.trainable, slot), lane.outline)
            if lane.result.best_step in (None, lane.step):
                return last, last
            return last, self.slots.adapter(self._take(self.best, slot), lane.outline)

    def resume(self, lanes: Mapping[str, Any], placed: Sequence[str | None], restored: dict[str, Any]) -> None:
        """Continues from a checkpoint: the progress of each lane, the lanes in the slots, and the arrays."""
        for name, lane in self.lanes.items():
            lane.restore(lanes[name])
        self.placed = [None if name is None else self.lanes[name] for name in placed]
        self.best = restored.pop("best", None)
        held = restored.pop("held", {})
        self.held = {name: (steps_lib.TrainState(**one["state"]), one["best"]) for name, one in held.items()}
        steps = np.array([0 if lane is None else lane.step for lane in self.placed], np.int32)
        self.state = steps_lib.TrainState(**restored, step=jax.device_put(steps, self.state.step.sharding))
        self.clock.resume(self.tokens)
        self._settle()

    def saved_state(self, held: Sequence[str] | None = None) -> dict[str, Any]:
        """The arrays of a checkpoint, with places for the arrays of the lanes in `held`, which have no slot there."""
        made = {"trainable": self.state.trainable, "opt_state": self.state.opt_state}
        made |= {"best": self.best} if self.best is not None else {}
        if held is None:
            between = self.held
        else:
            slot = np.int32(0)
            between = {name: (self._held(self.state, slot), self._held_best(self.best, slot)) for name in held}
        if not between:
            return made
        kept = {
            name: {
                "state": {"trainable": state.trainable, "opt_state": state.opt_state, "step": state.step},
                "best": best,
            }
            for name, (state, best) in between.items()
        }
        return made | {"held": kept}
