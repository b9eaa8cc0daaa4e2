"""What a run did, and which of its evaluations was the best."""

import collections
import dataclasses
import math
import statistics

_REMEMBERED, _KNOWN = 100, 20  # steps


@dataclasses.dataclass
class Result:
    """What a run did.

    Attributes:
      step: optimizer steps done, those before a resume included.
      evals: the last evaluation by set: what the objective reports (of next_token: loss, perplexity, accuracy, tokens).
      first_evals: the evaluation before the first step ({} in a resumed run).
      best_step: the step with the least loss on the set that chooses (None: no evaluation).
      stopped: "" at the end of the steps, else "signal", "patience" or "until", which was asked for.
      seconds: of training steps alone, compilation and evaluation apart.
      compile_seconds: of the training step.
      eval_seconds: of the last evaluation of all sets.
      tokens: tokens trained on (not padding) since the run was last started.
      trainable_parameters: how many numbers train.
      data_seconds: of the training seconds, those spent waiting for batches.
      empty_steps: steps of whose batch nothing counted for the loss.
      losses: of the last steps, by which a spike is told.
    """

    step: int = 0
    evals: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    first_evals: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    best_step: int | None = None
    stopped: str = ""
    seconds: float = 0.0
    compile_seconds: float = 0.0
    eval_seconds: float = 0.0
    tokens: int = 0
    trainable_parameters: int = 0
    data_seconds: float = 0.0
    empty_steps: int = 0
    losses: collections.deque[float] = dataclasses.field(
        default_factory=lambda: collections.deque(maxlen=_REMEMBERED), repr=False, compare=False
    )

    def spike(self, loss: float) -> float | None:
        """The usual loss where a step's is far above it, else None; the step's then counts among the usual ones.

        Far is six standard deviations of the last 100 steps, and a tenth of their mean; the first 20 tell nothing.

        >>> result = Result()
        >>> [result.spike(loss) for loss in [2.0, 2.1] * 20 + [9.0]][-2:]
        [None, 2.05]
        """
        before = list(self.losses)
        self.losses.append(loss)
        if len(before) < _KNOWN:
            return None
        usual, spread = statistics.fmean(before), statistics.pstdev(before)
        return usual if loss > usual + max(6 * spread, 0.1 * abs(usual)) else None


@dataclasses.dataclass(frozen=True)
class Selection:
    """The best evaluation so far, for the choice of a checkpoint and for early stopping.

    Attributes:
      loss: the least on the set that chooses; infinite before the first evaluation.
      worse: evaluations in a row without a better one.
    """

    loss: float = math.inf
    worse: int = 0

    def after(self, loss: float) -> "Selection":
        """With one more evaluation.

        >>> Selection().after(3.0).after(2.0).after(2.5)
        Selection(loss=2.0, worse=1)
        """
        return Selection(loss) if loss < self.loss else Selection(self.loss, self.worse + 1)

    def meta(self) -> dict[str, float | int | None]:
        """As a checkpoint's JSON has it."""
        return {"best": self.loss if math.isfinite(self.loss) else None, "bad": self.worse}

    @classmethod
    def of(cls, meta: dict[str, float | int | None]) -> "Selection":
        """The inverse of `meta`."""
        best, bad = meta["best"], meta["bad"]
        return cls(math.inf if best is None else best, int(bad or 0))
