"""What a fleet writes to disk: its own checkpoints, and for each ended adapter the checkpoints of a single run."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specjax import lora
from specjax.errors import UserError
from specjax.fleet.member import ENDED, HALVED, Lane
from specjax.fleet.session import Fleet
from specjax.fleet.slots import fresh
from specjax.lora.adapters import DEFAULT, Adapter, collect, on_host
from specjax.models import Decoder
from specjax.train import step as steps_lib
from specjax.train.checkpoint import Checkpoints, Damaged


class Archive:
    """The checkpoints of a fleet in its workdir, and those of its adapters in `adapters/<name>`.

    Args:
      workdir: of the fleet; None: nothing is written.
      keep: how many of the fleet's last checkpoints are kept.
      remember: also keep ended adapters in memory, for `ended`.
    """

    def __init__(self, workdir: Path | None, keep: int, *, remember: bool):
        self._workdir, self._remember = workdir, remember
        self._checkpoints = Checkpoints(workdir / "checkpoints", keep=keep) if workdir else None
        self._ended: dict[str, Adapter] = {}

    def __enter__(self) -> "Archive":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self._checkpoints:
            self._checkpoints.close()

    def save(self, run: Fleet) -> None:
        """Starts a checkpoint of the whole fleet.

        Raises:
          UserError: the disk is full.
        """
        if self._checkpoints is None:
            return
        meta = {"step": run.tick, "slots": [None if lane is None else lane.name for lane in run.placed]}
        meta |= {"adapters": {name: lane.meta() for name, lane in run.lanes.items()}, "tokens": run.tokens}
        meta |= {"held": sorted(run.held)}
        meta |= {"steps_done": run.steps_done, "base_fingerprint": run.base.origin.fingerprint}
        with run.clock.paused():
            self._checkpoints.save(run.tick, run.saved_state(), meta)

    def restore(self, run: Fleet) -> bool:
        """Restores the fleet from the last intact checkpoint; returns whether there is one.

        Raises:
          UserError: it is of another fleet, another base or other data.
        """
        if self._checkpoints is None:
            return False
        while (latest := self._checkpoints.latest()) is not None:
            try:
                meta = self._checkpoints.meta(latest)
                self._check_provenance(run, meta)
                restored = self._checkpoints.load(latest, run.saved_state(meta["held"]))
                break
            except Damaged as error:
                self._checkpoints.set_aside(latest, error)
        else:
            return False
        run.tick, run.tokens, run.steps_done = latest, meta["tokens"], meta["steps_done"]
        run.resume(meta["adapters"], meta["slots"], restored)
        return True

    def _check_provenance(self, run: Fleet, meta: Mapping[str, Any]) -> None:
        assert self._checkpoints is not None
        folder = self._checkpoints.folder
        if "adapters" not in meta:
            raise UserError(f"{folder}: the checkpoint is of one run and not of a fleet: start in a new workdir.")
        was, now = list(meta["adapters"]), list(run.lanes)
        if sorted(was) != sorted(now) or len(meta["slots"]) != run.count:
            raise UserError(
                f"{folder}: the checkpoint is of the adapters {', '.join(was)} in {len(meta['slots'])} slots, now "
                f"{', '.join(now)} in {run.count}: restore what it was, or start in a new workdir."
            )
        facts = {"base": (meta["base_fingerprint"], run.base.origin.fingerprint)}
        for name, lane in run.lanes.items():
            facts[f"data of {name}"] = (meta["adapters"][name]["data_fingerprint"], lane.member.data.fingerprint)
        for what, (before, after) in facts.items():
            if before != after:
                raise UserError(
                    f"{folder}: the checkpoint was made with another {what} ({before}, now {after}): restore what it "
                    "was, or start in a new workdir."
                )

    def _folder(self, name: str) -> Path:
        assert self._workdir is not None
        return self._workdir / "adapters" / name / "checkpoints"

    def write(self, run: Fleet, lane: Lane, last: Adapter, best: Adapter) -> Decoder:
        """Writes a lane's last and best weights as a single run's checkpoints, without the optimizer's state.

        Returns:
          The base with the best adapter attached.
        """
        model = run.slots.alone(best)
        if self._remember:
            self._ended[lane.name] = last
        if self._workdir is None:
            return model
        folder = self._folder(lane.name)
        if folder.exists():  # of a start that was killed before the fleet's checkpoint was whole
            shutil.rmtree(folder)
        meta = lane.meta() | {"base": run.base.origin.source, "base_fingerprint": run.base.origin.fingerprint}
        steps: dict[int, tuple[Decoder, float | None]] = {lane.result.best_step or lane.step: (model, lane.least)}
        if lane.step not in steps:
            steps[lane.step] = (run.slots.alone(last), None)
        saved = Checkpoints(folder)
        for step, (worn, loss) in steps.items():
            saved.save(step, {"trainable": steps_lib.split(worn, lora.LORA)[1]}, meta | {"step": step}, loss)
        saved.close()
        return model

    def ended(self, run: Fleet) -> dict[str, Adapter]:
        """The adapters that ended, with their last weights; those of an earlier start are read from their folders."""
        lanes = [lane for lane in run.lanes.values() if lane.status == ENDED and lane.result.stopped != HALVED]
        return {lane.name: self._ended.get(lane.name) or self._read(run, lane) for lane in lanes}

    def _read(self, run: Fleet, lane: Lane) -> Adapter:
        model = run.slots.alone(fresh(run.base, lane.member.lora))
        saved = Checkpoints(self._folder(lane.name), read_only=True)
        params = saved.load(lane.step, {"trainable": steps_lib.split(model, lora.LORA)[1]})["trainable"]
        steps_lib.write_back(model, params)
        saved.close()
        return on_host(collect(model, DEFAULT))
