"""What lies in a workdir, and whether this config may go on with it.

A run that is called again goes on. It may then be computed otherwise: on another mesh, in other micro-batches, with
other rematerialisation. What would change its result is refused, the keys named.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from specjax import files
from specjax.config import HOW, differing
from specjax.config.checks import sources
from specjax.data import Data, Mixture
from specjax.errors import UserError
from specjax.hf import config as hf_config
from specjax.train.result import Result


def claim(workdir: Path, config: ConfigDict, settings: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Refuses a workdir that holds something else, or a run whose result this config would change.

    Returns:
      Keys that only say how the run's batches are computed and that are others now: key -> (was, is). Empty where there
      is nothing to go on with.

    Raises:
      UserError: as above.
    """
    refuse_sources(workdir, config)
    files.claim(workdir)
    out = workdir / "export"
    if config.export and not exported(workdir) and (out.is_file() or (out.is_dir() and any(out.iterdir()))):
        raise UserError(f"{out} holds something else than weights, which are written there: move it away.")
    if not begun(workdir):
        if exported(workdir):
            raise UserError(f"{workdir} holds an export but no checkpoint to resume from: choose another workdir.")
        return {}  # it ended before anything was learnt: nothing to resume, nothing to lose
    # Micro-batches draw their own dropout, and `eval.batches` counts batches of as many rows.
    drawn = settings["lora"].get("dropout") or settings["lora"].get("init_from") or settings["eval"]["batches"]
    return changes(workdir, settings, drawn=bool(drawn))


def refuse_sources(workdir: Path, config: ConfigDict) -> None:
    """Raises `UserError` where the workdir is a folder that the run reads, or lies in one."""
    for key, source, inside in _sources(config):
        # Not Path.resolve: of a link that leads to itself it is no error of the system's.
        place, ours = Path(os.path.realpath(source)), Path(os.path.realpath(workdir))
        if source and place.exists() and (place == ours or (inside and place in ours.parents)):
            lies = "is the folder" if place == ours else "lies in the folder"
            raise UserError(f"--workdir={workdir} {lies} that {key} reads: choose another workdir.")


def changes(workdir: Path, settings: Mapping[str, Any], *, drawn: bool) -> dict[str, tuple[Any, Any]]:
    """In what a begun run's config is another now, see `claim`; `drawn`: micro-batches are part of the result."""
    old = files.read_object(workdir / "config.json", "restore it, or choose another workdir")
    changed = {key: (_at(old, key), _at(settings, key)) for key in differing(old, settings)}
    refused = [key for key in changed if not HOW.match(key) or (key == "accumulate" and drawn)]
    if refused:
        said = ", ".join(f"{key} (was {changed[key][0]!r}, now {changed[key][1]!r})" for key in refused)
        raise UserError(f"{workdir} holds a run with another config: {said}; undo that, or choose another workdir.")
    return changed


def check_model(workdir: Path, changed: Mapping[str, Any], folder: Path, config: ConfigDict) -> None:
    """Raises `UserError` where other micro-batches (`changed`) change what this model's folder learns."""
    if "accumulate" not in changed:
        return
    sizes, given = hf_config.from_folder(folder), config.model.router_aux_coef
    if sizes.num_experts and (sizes.router_aux_coef if given is None else given):
        was, now = changed["accumulate"]
        raise UserError(
            f"{workdir} holds a run with accumulate {was}, now {now}: a mixture of experts balances each micro-batch "
            "by itself, so the result would be another; undo that, or choose another workdir."
        )


def steps(workdir: Path, config: ConfigDict, data: Data | Mixture) -> int:
    """Of the run: those of the config, or those that its epochs make.

    A run keeps those that it was started with, over which its learning rate is laid. One that specjax 0.1 started with
    `epochs` has whole batches in a pass, at least one: `data.json` does not say it.
    """
    now = config.steps or data.steps(config.epochs)
    if config.steps or not begun(workdir):
        return now
    said = files.read_object(workdir / "data.json", "restore it, or choose another workdir").get("train")
    was = said.get("steps") if isinstance(said, dict) else None
    return was if isinstance(was, int) else max(1, round(config.epochs * max(1, data.num_rows // data.batch_size)))


def finished(workdir: Path, config: ConfigDict) -> Result | None:
    """What a complete run did (its summary is written last), or None while something is left to do."""
    path = workdir / "summary.json"
    if not path.exists() or (config.export and not exported(workdir)):
        return None
    found, kept = files.read_object(path, "delete it"), ("step", "best_step", "stopped", "trainable_parameters")
    if absent := [name for name in kept if name not in found]:
        raise UserError(f"{path} has no {absent[0]}: delete it.")
    return Result(**{name: found[name] for name in kept})


def exported(workdir: Path) -> bool:
    """Whether the export is there: it appears whole, but an empty folder is none."""
    return any((workdir / "export").glob("*.safetensors"))


def begun(workdir: Path) -> bool:
    """Whether a checkpoint lies there."""
    return any((workdir / "checkpoints").glob("[0-9]*"))


def _sources(config: ConfigDict) -> list[tuple[str, str, bool]]:
    """(key, folder, whether what lies deeper in it is read too) of what a run reads."""
    models = {"config.model.path": config.model.path, "config.lora.init_from": config.lora.init_from or ""}
    trains = [("config.data.train", source, True) for source, _ in sources(config).values()]
    sets = [(f"config.data.eval.{name}", path, True) for name, path in config.data.eval.items()]
    return [*((key, path, False) for key, path in models.items()), *trains, *sets]


def _at(settings: Mapping[str, Any], key: str) -> Any:
    value: Any = settings
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
