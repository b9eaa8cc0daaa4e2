"""The settings of an adapter of a fleet, and its progress."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from specjax import lora
from specjax.errors import UserError, naming
from specjax.fleet.slots import Outline
from specjax.fleet.step import Rule
from specjax.models import Decoder
from specjax.train import optim
from specjax.train.objective import Objective
from specjax.train.result import Result, Selection
from specjax.train.session import check_columns, check_ids

WAITING, TRAINING, PAUSED, ENDED, FAILED = "waiting", "training", "paused", "ended", "failed"
HALVED = "halved"  # how a lane ended, that was among the worse ones at a rung


@dataclasses.dataclass(frozen=True)
class Member:
    """One adapter of a fleet, with the arguments that `lora.inject`, the optimizer and `fit` would get for it alone.

    Attributes:
      data: a `specjax.data.Data` or `Mixture`; length and batch size are the same for all members.
      steps: the total number of optimizer steps.
      lora: arguments of `lora.inject`: rank, alpha, targets, dropout, rslora, seed and so on.
      learning_rate: a number, or a function of the step.
      weight_decay: multiplied by the learning rate.
      clip_norm: its gradient is scaled down to this norm; 0: no clipping.
      seed: of its dropout.
      eval_data: sets by name, evaluated before its first step, every `eval_every` steps and at its end.
      eval_every: steps; 0: at the start and the end only.
      eval_batches: of each set; 0: all.
      patience: stop after so many evaluations in a row without a better loss; 0: never.
      best: the set whose loss chooses its best step; default the first.
      sample: called at each evaluation: model -> [(prompt, text)] to show.
      measure: called at each evaluation: model -> further numbers of sets of `eval_data`, by name.
    """

    data: Any
    steps: int
    lora: Mapping[str, Any]
    learning_rate: float | Callable[[Any], Any] = 1e-4
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    seed: int = 0
    eval_data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    eval_every: int = 0
    eval_batches: int = 0
    patience: int = 0
    best: str = ""
    sample: Callable[[Decoder], Sequence[tuple[str, str]]] | None = None
    measure: Callable[[Decoder], Mapping[str, Mapping[str, float]]] | None = None

    @property
    def chooses(self) -> str:
        """The set that decides which step is the best; "": there is none."""
        return self.best or next(iter(self.eval_data), "")

    def rates(self) -> np.ndarray:
        """float32 [steps]: the learning rate of each step."""
        given = self.learning_rate
        if not callable(given):
            return np.full(self.steps, given, np.float32)
        return np.asarray(jax.vmap(given)(jnp.arange(self.steps, dtype=jnp.int32)), np.float32)


def adamw(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> Rule:
    """`specjax.adamw` for a fleet: each adapter has its own rate and weight decay."""
    return lambda rate, decay: optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=decay, mask=optim.decays)


def lion(b1: float = 0.9, b2: float = 0.99) -> Rule:
    """`specjax.lion` for a fleet: each adapter has its own rate and weight decay."""
    return lambda rate, decay: optax.lion(rate, b1=b1, b2=b2, weight_decay=decay, mask=optim.decays)


@dataclasses.dataclass
class Lane:
    """A member and its progress.

    Attributes:
      outline: its ranks, scales and dropout, by linear layer.
      rates: of `Member.rates`.
      keys: uint32 [2], the key data of its dropout.
      step: number of updates so far.
      tokens: of all its steps.
      status: one of the words above.
      why: why it failed, in one sentence.
      least: the loss at `result.best_step`.
      rungs: the steps at which it waits for the others, and only the better ones continue.
      passed: how many rungs it has passed.
      at_rung: the loss at the last one.
    """

    name: str
    member: Member
    outline: Outline
    rates: np.ndarray
    keys: np.ndarray
    step: int = 0
    tokens: int = 0
    status: str = WAITING
    why: str = ""
    least: float | None = None
    rungs: tuple[int, ...] = ()
    passed: int = 0
    at_rung: float = math.inf
    selection: Selection = dataclasses.field(default_factory=Selection)
    result: Result = dataclasses.field(default_factory=Result)

    @classmethod
    def of(cls, name: str, member: Member, outline: Outline, rungs: Sequence[float] = ()) -> "Lane":
        """A lane before its first step; `rungs` are shares of its steps."""
        if member.steps < 1:
            raise UserError(f"it has {member.steps} steps: give it at least 1.")
        keys = np.asarray(jax.random.key_data(jax.random.key(member.seed)))
        made = cls(name, member, outline, member.rates(), keys)
        made.rungs = tuple(max(1, round(share * member.steps)) for share in rungs)
        if rungs and not member.eval_data:
            raise UserError("it has no set to be measured on at the rungs: give it one.")
        return made

    @property
    def climbs(self) -> bool:
        """Whether the last step reached a rung."""
        return self.passed < len(self.rungs) and self.step == self.rungs[self.passed]

    @property
    def evaluates(self) -> bool:
        """Whether an evaluation is due after the last step."""
        every, m = self.member.eval_every, self.member
        return self.climbs or bool(m.eval_data) and (self.step == m.steps or bool(every and self.step % every == 0))

    @property
    def done(self) -> bool:
        """Whether it has no steps or no patience left."""
        if self.step >= self.member.steps:
            return True
        if self.member.patience and self.selection.worse >= self.member.patience:
            self.result.stopped = "patience"
            return True
        return False

    def chosen(self, loss: float) -> bool:
        """Records an evaluation's loss; returns whether it is the lowest of those after a step."""
        self.selection = self.selection.after(loss)
        if not self.step or (self.least is not None and loss > self.least):
            return False
        self.least, self.result.best_step = loss, self.step
        return True

    def meta(self) -> dict[str, Any]:
        """Its form in the fleet's checkpoint."""
        held = {"step": self.step, "tokens": self.tokens, "status": self.status, "why": self.why, "least": self.least}
        held |= {"passed": self.passed, "at_rung": self.at_rung if math.isfinite(self.at_rung) else None}
        held |= {"best_step": self.result.best_step, "stopped": self.result.stopped, "evals": self.result.evals}
        held |= {"first_evals": self.result.first_evals, "data_fingerprint": self.member.data.fingerprint}
        return held | self.selection.meta()

    def restore(self, meta: Mapping[str, Any]) -> None:
        """The inverse of `meta`."""
        self.step, self.tokens, self.status, self.why = (meta[key] for key in ("step", "tokens", "status", "why"))
        self.least, self.selection = meta["least"], Selection.of(dict(meta))
        self.result.best_step, self.result.stopped = meta["best_step"], meta["stopped"]
        self.result.evals, self.result.first_evals = meta["evals"], meta["first_evals"]
        self.passed, self.at_rung = meta["passed"], math.inf if meta["at_rung"] is None else meta["at_rung"]
        self.result.step = self.step


def check_base(base: Decoder) -> None:
    """Raises `UserError` if a fleet cannot train over this base."""
    if lora.names(base):
        raise UserError(f"the base wears {', '.join(lora.names(base))}: unload all adapters first.")
    if base.config.num_experts:
        raise UserError("a fleet over a mixture of experts cannot be exact yet: train its adapters one by one.")


def checked(
    base: Decoder, objective: Objective, members: Mapping[str, Member], accumulate: int
) -> tuple[Objective, dict[str, Member]]:
    """The objective and members as `Objective.prepare` makes them.

    Raises:
      UserError: members that cannot share a batch, or cannot train.
    """
    made, prepared = dict[str, Member](), objective
    if not members:
        raise UserError("a fleet without members: give at least one.")
    check_base(base)
    first = next(iter(members.values())).data
    for name, member in members.items():
        with naming(f"adapter {name}"):
            data, rows = member.data, max(1, member.data.batch_size // accumulate)
            if data.batch_size % accumulate:
                raise UserError(f"a batch of {data.batch_size} rows does not divide into {accumulate} micro-batches.")
            for what in ("length", "batch_size"):
                if getattr(data, what) != getattr(first, what):
                    raise UserError(
                        f"its data has {what} {getattr(data, what)}, the first adapter's {getattr(first, what)}: they "
                        "share a batch, so make them alike."
                    )
            for label, one in {"the data": data, **{f"the set {n!r}": d for n, d in member.eval_data.items()}}.items():
                check_ids(label, one, base.config.vocab_size)
            prepared, sets = objective.prepare(objective, base, lora.LORA, {"": data, **member.eval_data}, rows)
            for label, one in sets.items():
                check_columns(prepared, label or "the data", one)
            made[name] = dataclasses.replace(member, data=sets.pop(""), eval_data=sets)
    return prepared, made
