"""The command line: one verb and its flags. Nothing heavy is imported before both are known to be right."""

import errno
import os
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from specjax import __version__, process
from specjax.chat import prompts
from specjax.cluster.launch import launch
from specjax.config import get_config
from specjax.config import keys as config_keys
from specjax.config.checks import FREE, TEXTS, TYPES, nearest_key
from specjax.config.source import load_config_file
from specjax.errors import UserError, nearest
from specjax.values import shown
from specjax.verbs import FLAGS, VERBS, WIDTH, help_of, help_of_all

# What a file or a folder may be, and what to do; any other error of the system's is a bug of ours.
SURROUNDINGS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free some space"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "give another place, or its permissions"),
    **dict.fromkeys((errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EEXIST), "give another path"),
    **dict.fromkeys((errno.EIO, errno.ESTALE, errno.ETIMEDOUT), "look at the disk or the network"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit of open files (ulimit -n)"),
}
INTERRUPTED = 130  # what a shell says of Ctrl-C


def entry() -> None:
    """The `specjax` command, in a process of its own."""
    try:
        status = main(sys.argv[1:], own_process=True)
    except Exception as error:
        if "--distributed" not in sys.argv:
            raise
        from specjax.cluster import processes

        processes.wait_for_the_cause(error)
        traceback.print_exc()
        status = 1
    except SystemExit as stop:
        if stop.code != process.STOPPED:
            raise
        status = process.STOPPED
    if status and "--distributed" in sys.argv:
        from specjax.cluster import processes

        # At a normal end all processes wait for each other; the others may be waiting for this one elsewhere.
        processes.leave(status, failed=status != process.STOPPED)
        process.leave(status)
    if status in (INTERRUPTED, process.STOPPED):
        process.leave(status)  # threads of XLA's may be at work still, and crash in an interpreter that ends under them
    sys.exit(status)


def main(argv: Sequence[str], *, own_process: bool = False) -> int:
    """Runs one command and returns its exit status: 2, and one sentence on stderr, for a user's mistake.

    Only where the process is the command's own is anything of it changed (`specjax.process`).
    """
    if not argv or {"help", "-h", "--help"}.intersection(argv):
        return _help(argv)
    if argv[0] == "--version":
        print(f"specjax {__version__}")
        return 0
    try:
        verb = argv[0]
        if own_process and verb == "train":
            process.ask_for_huge_pages()
        arguments = parse(verb, argv[1:])  # runs the config file: the user's program, before anything is left out
        if own_process and verb == "train" and not arguments["distributed"]:  # else JAX hears of SIGTERM
            process.end_at_signals()
        if own_process and verb != "launch":
            process.prepare()
        return _call(verb, arguments, own_process)
    except UserError as error:
        print("specjax:", str(error).replace("\n", " "), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("specjax: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno not in SURROUNDINGS:
            raise
        where = f" ({error.filename})" if error.filename else ""
        said = "The disk is full" if error.errno == errno.ENOSPC else os.strerror(error.errno)
        print(f"specjax: {said}{where}: {SURROUNDINGS[error.errno]} and run the same command again.", file=sys.stderr)
        return 2


def _help(argv: Sequence[str]) -> int:
    """`train --help`, `help train`, `help config`, `help config.lora`; of all, where none is named."""
    named = [word for word in argv[:2] if not word.startswith("-") and word != "help"]
    if named and named[0] in VERBS:
        print(help_of(named[0]), end="")
    elif named and named[0].partition(".")[0] == "config":
        try:
            print(config_keys.help_of(named[0], WIDTH), end="")
        except UserError as error:
            print("specjax:", error, file=sys.stderr)
            return 2
    else:
        print(help_of_all(), end="")
    return 0


def parse(verb: str, argv: Sequence[str]) -> dict[str, Any]:
    """The flags of `verb` by name, those not given at their defaults; `config` is the config, overrides applied.

    Raises:
      UserError: for an unknown verb or flag, a value of the wrong type, a flag that is missing or another verb's.
    """
    if verb not in VERBS:
        what = "The verb comes first" if verb.startswith("-") else f"There is no verb '{verb}'"
        raise UserError(f"{what}: it is one of {', '.join(VERBS)}.{nearest(verb, VERBS)}")
    needs, may = VERBS[verb].needs, VERBS[verb].may
    path, overrides, others = _split(argv)
    values = _flag_values()
    try:
        rest = values(["specjax", *others])[1:]
        if rest:
            raise UserError(f"`specjax {verb}` takes flags alone, and {rest[0]!r} is none.{_as_flag(needs, rest[0])}")
        if own := VERBS[verb].keys:
            _check_keys(verb, own, overrides)
        named = path or (overrides and not own)
        present = {name for name in values if values[name].present} | ({"config"} if named else set())
        for name in sorted(present.difference(needs, may)):
            raise UserError(
                f"--{name} is no flag of `specjax {verb}`, which takes {_dashed((*needs, *may)) or 'none'}."
            )
        arguments = {name: values[name].value for name in (*needs, *may) if name != "config"}
        if "config" in needs and path:
            arguments["config"] = read_config(path, overrides)
        if own:
            arguments["start"] = read_config("", overrides)
        if verb == "launch":
            arguments["given"] = [f"--config={path}", *overrides]
    except flags.Error as error:
        raise UserError(_sentence(error, values)) from None
    for name in needs:
        if not arguments.get(name):
            raise UserError(f"`specjax {verb}` needs --{name}: {FLAGS[name].does}.")
    for name in ("workdir", "out"):
        if "://" in (arguments.get(name) or ""):
            raise UserError(f"--{name}={arguments[name]} is no folder: mount the bucket, and give its path.")
    if verb in ("generate", "chat", "combine"):
        arguments["adapters"] = prompts.adapters(arguments.pop("adapter"), addressed=verb != "combine")
    if verb == "combine":
        arguments["weights"] = _weights(arguments.pop("weight"), arguments["adapters"])
    if verb == "compare":
        arguments["target"] = arguments.pop("for")  # a word of Python's
        arguments["prices"] = _prices(arguments.pop("price"))
    if verb == "generate":
        given = arguments.pop("prompt"), arguments.pop("prompt_file")
        arguments["prompts"] = prompts.prompts(*given, arguments["adapters"])
    return arguments


def read_config(path: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The config of a file (""; the defaults), with `--config.KEY=VALUE` overrides, each typed as the key is.

    Raises:
      UserError: for what is wrong with the file, a key or a value.
    """
    config = load_config_file(path) if path else get_config()
    typed, texts = [], dict[str, list[str]]()
    for override in overrides:
        key, _, value = override.removeprefix("--config.").partition("=")
        group, _, name = key.rpartition(".")
        if group in FREE:
            config[group].unlock()
            config[group][name] = value
        elif key in TEXTS:  # a string each: ml_collections would read it as Python
            texts.setdefault(key, []).append(value)
        elif not _has(config, key := re.sub(r"^--noconfig\.", "", key)):
            raise UserError(f"--config.{key} is no key of the config.{nearest_key(key, get_config())}")
        elif isinstance(config[key], ConfigDict) and key not in FREE:
            raise UserError(
                f"--config.{key} is a group of keys: set one of them, such as --config.{key}.{next(iter(config[key]))}."
            )
        else:
            typed.append(override)
    values = flags.FlagValues()
    argv = ["specjax", *typed]
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
        values(argv)
    except flags.Error as error:
        raise UserError(_sentence(error, values)) from None
    for key, given in texts.items():
        group, _, name = key.rpartition(".")
        config[group][name] = tuple(given)
    return config


def _check_keys(verb: str, own: str, overrides: Sequence[str]) -> None:
    """Raises `UserError` for a key of the config that a verb which takes some of them does not take."""
    for override in overrides:
        key = override.partition("=")[0].removeprefix("--noconfig.").removeprefix("--config.")
        if not re.fullmatch(own, key):
            raise UserError(
                f"--config.{key} is none of the keys that `specjax {verb}` takes, which say how the data are read: "
                "leave it out, and give it to `specjax train`."
            )


def _call(verb: str, arguments: dict[str, Any], own_process: bool) -> int:
    """Calls the function that the verb names; returns the exit status."""
    if verb == "launch":  # the config was read for its mistakes: what is started reads it again
        return launch(**(arguments | {"config": arguments.pop("given")}))
    if verb == "families":
        from specjax import parity

        parity.show()
        return 0
    if verb == "env":
        from specjax import env

        print(env.report())
        return 0
    if verb == "plan":  # it compiles for devices that are not here, and must ask for none that are
        from specjax.plan import report, targets

        if own_process:
            process.ask_for_no_device(targets.cpus(arguments["target"]))
        report.report(**arguments)
        return 0
    if verb == "advise":  # by shapes alone: it must ask for no device
        from specjax.advise import report as advice

        if own_process:
            process.ask_for_no_device()
        advice.advise(**arguments)
        return 0
    if verb == "compare":  # its children train: this process must not take the accelerator
        from specjax.compare import compare

        compare(**arguments)
        return 0
    if verb == "report":
        from specjax.report import page

        page.report(**(arguments | {"lang": arguments["lang"] or "en"}))
        return 0
    from specjax import run

    if arguments.pop("distributed", False):
        from specjax.cluster import processes

        processes.join(watch=own_process and process.enabled("quiet"), workdir=arguments.get("workdir"))
        if own_process:
            process.keep_gloo_quiet()
    if own_process and verb in ("train", "eval", "generate", "chat"):
        process.keep_compiled()
    match verb:
        case "train" if arguments["config"].fleet or arguments["config"].sweep:
            from specjax.fleet import job

            job.train(**arguments)
        case "train":
            run.train(**arguments)
        case "eval":
            run.evaluate(**arguments)
        case "generate":
            run.generate(**arguments)
        case "chat":
            from specjax.chat import terminal

            terminal.chat(**arguments)
        case "export":
            run.export(**arguments)
        case "combine":
            run.combine(**arguments)
        case "data":
            run.data(**arguments)
    return 0


def _flag_values() -> flags.FlagValues:
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    for name, flag in FLAGS.items():
        if name != "config":  # of ml_collections
            flag.define(values)
    return values


def _split(argv: Sequence[str]) -> tuple[str, list[str], list[str]]:
    """`--config`'s file, its overrides as `--config.KEY=VALUE` or `--[no]config.KEY`, and all other arguments."""
    path, overrides, others, rest = "", [], [], list(argv)
    while rest:
        argument = re.sub(r"^-(?=(no)?config\b)", "--", rest.pop(0))
        if not re.match(r"--(no)?config(?![\w])", argument):
            # --dry-run is --dry_run
            others.append(re.sub(r"^--[a-z-]+", lambda hit: "--" + hit[0][2:].replace("-", "_"), argument))
            continue
        if "=" not in argument and rest and not rest[0].startswith("--") and not argument.startswith("--no"):
            argument = f"{argument}={rest.pop(0)}"
        if argument.startswith("--config="):
            path = argument.removeprefix("--config=")
        elif argument != "--config":
            overrides.append(argument)
    return path, overrides, others


def _has(config: Any, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(config, ConfigDict) or part not in config:
            return False
        config = config[part]
    return True


def _sentence(error: flags.Error, values: flags.FlagValues) -> str:
    """What absl says of a bad flag, in our words."""
    if isinstance(error, flags.UnrecognizedFlagError):
        return f"There is no flag --{error.flagname}.{nearest(error.flagname, [*values, 'config'])}"
    if wrong := re.match(r"flag --([\w.]+)=(.*?): ", text := str(error), re.DOTALL):
        parser = values[wrong[1]].parser
        kinds = {flags.IntegerParser: int, flags.FloatParser: float, flags.BooleanParser: bool}
        kind = next((kind for cls, kind in kinds.items() if isinstance(parser, cls)), None)
        if kind and "not a" not in text.removeprefix(wrong[0]):
            return f"--{wrong[1]} takes {TYPES[kind]}, not {shown(wrong[2])}."
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."


def _as_flag(needs: Sequence[str], text: str) -> str:
    return f" Did you mean --{needs[0]}={text}?" if len(needs) == 1 else ""


def _dashed(names: Sequence[str]) -> str:
    return ", ".join(f"--{name}" for name in names)


def _prices(given: Sequence[str]) -> dict[str, float]:
    """`FAMILY=X`, each family once."""
    prices: dict[str, float] = {}
    for text in given:
        name, _, number = text.partition("=")
        if not name or name in prices or not re.fullmatch(r"\d+(\.\d+)?", number):
            raise UserError(
                f"--price={text}: give what a chip costs per hour, once per family, such as --price=v5e=1.2."
            )
        prices[name] = float(number)
    return prices


def _weights(given: Sequence[str], adapters: Mapping[str, str]) -> dict[str, float]:
    """`NAME=X` of each adapter."""
    weights: dict[str, float] = {}
    for text in given:
        name, equals, number = text.rpartition("=")
        if not equals or name not in adapters or name in weights:
            raise UserError(
                f"--weight={text}: give each adapter one weight by its name, such as --weight={[*adapters][0]}=0.5."
            )
        try:
            weights[name] = float(number)
        except ValueError:
            raise UserError(f"--weight={text}: {number!r} is no number.") from None
    if missing := [name for name in adapters if name not in weights]:
        raise UserError(f"adapter {missing[0]} has no weight: give --weight={missing[0]}=0.5, or another number.")
    return weights
