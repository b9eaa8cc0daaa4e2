"""The verbs of the command and their flags, each written once: what is parsed, what the help says, what is missing."""

import dataclasses
import textwrap
from collections.abc import Iterator
from typing import Any

from absl import flags

from specjax.cluster.launch import ENGINES
from specjax.process import DISABLE, PARTS

WIDTH = 120


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag.

    Attributes:
      name: without dashes; `--dry-run` is `--dry_run`.
      value: how the help calls its value; "" for a switch.
      does: what the help, and the error where it is missing, say of it.
      type: of the value.
      default: where it is not given; None and "": not given.
      many: it may be repeated; the value is then a list.
      least: bound of a number.
      most: likewise.
      more: what the help says beyond `does`.
    """

    name: str
    value: str
    does: str
    type: type = str
    default: Any = None
    many: bool = False
    least: float | None = None
    most: float | None = None
    more: str = ""

    def define(self, values: flags.FlagValues) -> None:
        """Makes absl know it."""
        bounds = {"lower_bound": self.least, "upper_bound": self.most, "flag_values": values}
        if self.many:
            flags.DEFINE_multi_string(self.name, [], "", flag_values=values)
        elif self.type is bool:
            flags.DEFINE_bool(self.name, bool(self.default), "", flag_values=values)
        elif self.type is int:
            flags.DEFINE_integer(self.name, self.default, "", **bounds)
        elif self.type is float:
            flags.DEFINE_float(self.name, self.default, "", **bounds)
        elif "|" in self.value and self.value.islower():
            flags.DEFINE_enum(self.name, self.default, self.value.split("|"), "", flag_values=values)
        else:
            flags.DEFINE_string(self.name, self.default or "", "", flag_values=values)

    def form(self) -> str:
        """As it is typed: --workdir=DIR."""
        return f"--{self.name}={self.value}" if self.value else f"--{self.name}"

    def told(self) -> str:
        """What the help says of it."""
        engines = [engine for engine, (needs, may) in ENGINES.items() if self.name in (*needs, *may)]
        parts = (self.does, self.more, "repeatable" if self.many else "", ", ".join(engines))
        return "; ".join(part for part in parts if part)


def _flags() -> Iterator[Flag]:
    yield Flag(
        "config",
        "F",
        "the file to start from, such as --config=configs/lora.py",
        more="--config.KEY=VALUE changes any key of it",
    )
    yield Flag("workdir", "DIR", "the run's folder, such as --workdir=runs/lora")
    yield Flag("distributed", "", "this process is one of several, as `specjax launch` starts them", bool)
    yield Flag("profile", "", "a trace of three steps, in the workdir", bool)
    # generate
    yield Flag("model", "M", "a Hugging Face folder, a hub name or a run's folder, such as --model=runs/lora")
    yield Flag("adapter", "[NAME=]DIR", "a PEFT adapter that answers", many=True)
    yield Flag("prompt", "TEXT", "- is standard input", many=True)
    yield Flag("prompt_file", "F", "a prompt per line")
    yield Flag("system", "TEXT", "the system's words before each prompt")
    yield Flag("raw", "", "no chat template", bool)
    yield Flag("stop", "TEXT", "ends an answer where it comes", many=True)
    yield Flag("seed", "0", "of what is drawn", int, 0, least=0)
    yield Flag("max_new_tokens", "N", "default: generation_config.json's, else 128", int, least=1)
    yield Flag("temperature", "X", "default: generation_config.json's, else 0, which is greedy", float, least=0.0)
    yield Flag("top_k", "N", "draws from the N likeliest", int, least=0)
    yield Flag("top_p", "X", "draws from the likeliest of this probability together", float, least=0.0, most=1.0)
    yield Flag("min_p", "X", "draws from those as likely as X times the likeliest", float, least=0.0, most=1.0)
    yield Flag("repetition_penalty", "X", "makes what was said less likely", float, least=0.0)
    yield Flag("generation_config", "false", "leaves the model's generation_config.json out", bool, True)
    # export
    yield Flag("out", "DIR", "the folder to write, such as --out=exported")
    yield Flag("merge", "", "LoRA into the base's weights", bool)
    yield Flag("dequantise", "", "with --merge: into a quantised base's dequantised weights", bool)
    yield Flag("step", "N", "default: the best, or the last", int, least=0)
    yield Flag("overwrite", "", "replace what is in the folder", bool)
    yield Flag("dtype", "bfloat16|float32|float16", "default: that of the base's files")
    # data
    yield Flag("rows", "N,N", "rows of the training data by number, as a run names them, and nothing else")
    # combine
    yield Flag("weight", "NAME=X", "of an adapter, such as --weight=hr=0.7", many=True)
    yield Flag(
        "how",
        "WAY",
        "svd, cat, linear, ties, dare_linear, dare_ties or magnitude_prune, the last four also with _svd behind; "
        "default svd",
        default="svd",
    )
    yield Flag("rank", "N", "of the new adapter, where the way is svd or ends in it; default the largest", int, least=1)
    yield Flag("density", "X", "the share of numbers that ties, dare and magnitude_prune keep", float)
    yield Flag("majority_sign", "total|frequency", "of ties: which sign wins; default total", default="total")
    # plan
    yield Flag(
        "target",
        "FAMILY:SHAPE",
        "hardware to compile for, such as --target=v5e:4x4 or --target=cpu:8",
        many=True,
        more="v5p:2x2x4, v6e:2x4, tpu7x:2x2x1, 2*v5e:4x4 for two slices, h100:8; v5e: its smallest slice that will do",
    )
    yield Flag("json", "", "an object per target, and nothing else", bool)
    yield Flag("search", "", "meshes, remat and micro-batches tried and ranked", bool)
    yield Flag(
        "price_per_chip_hour", "X", "what a million tokens, and an epoch of the data, cost", float, 0.0, least=0.0
    )
    # launch
    yield Flag("on", "ENGINE", "who starts the processes: --on=local:N, gcloud-tpu, gke or slurm")
    yield Flag("dry_run", "", "print, start nothing", bool)
    yield Flag("name", "TEXT", "of the machine or the job")
    yield Flag("zone", "TEXT", "where the machine is")
    yield Flag("project", "TEXT", "of Google Cloud")
    yield Flag("image", "TEXT", "of the container")
    yield Flag("accelerator", "TEXT", "GKE's name of the TPU")
    yield Flag("topology", "TEXT", "chips of a slice, such as 4x4")
    yield Flag("namespace", "TEXT", "of Kubernetes")
    yield Flag("bucket", "TEXT", "mounted at /bucket")
    yield Flag("service_account", "TEXT", "of Kubernetes")
    yield Flag("time", "TEXT", "the job's limit")
    yield Flag("partition", "TEXT", "of the cluster")
    yield Flag("account", "TEXT", "that pays")
    yield Flag("setup", "TEXT", "shell, before the command")
    yield Flag("nodes", "N", "machines", int, least=1)
    yield Flag("gpus_per_node", "N", "processes on each", int, least=1)
    yield Flag("slices", "N", "default 1", int, least=1)
    yield Flag("restarts", "N", "default 10", int, least=1)


FLAGS = {flag.name: flag for flag in _flags()}


@dataclasses.dataclass(frozen=True)
class Verb:
    """What a verb does, the flags that it needs, those that it may have."""

    does: str
    needs: tuple[str, ...]
    may: tuple[str, ...] = ()


_DRAWING = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "generation_config")
_ENGINES = sorted({name for needs, may in ENGINES.values() for name in (*needs, *may)})
VERBS = {
    "train": Verb(
        "run the job; called again on the same folder, it goes on",
        ("config", "workdir"),
        ("distributed", "profile"),
    ),
    "eval": Verb("loss, perplexity and token accuracy on the named sets", ("config", "workdir"), ("distributed",)),
    "generate": Verb(
        "what a model, or a run's folder, answers to --prompt=TEXT",
        ("model",),
        ("adapter", "prompt", "prompt_file", "raw", "system", "stop", "seed", *_DRAWING, "distributed"),
    ),
    "export": Verb(
        "a Hugging Face folder, or a PEFT adapter",
        ("workdir", "out"),
        ("merge", "dequantise", "step", "overwrite", "dtype", "distributed"),
    ),
    "data": Verb("what the model will see: counts, losses, the mask in colour", ("config",), ("rows",)),
    "combine": Verb(
        "one PEFT adapter of several, each with its weight",
        ("model", "adapter", "weight", "out"),
        ("how", "rank", "density", "majority_sign", "seed", "overwrite", "distributed"),
    ),
    "compare": Verb("the methods of config.compare on the same data, in one table", ("config", "workdir")),
    "plan": Verb(
        "does it fit there, and how fast can it be, without the devices",
        ("config", "target"),
        ("json", "search", "price_per_chip_hour"),
    ),
    "launch": Verb(
        "train on several hosts, or in several processes", ("on", "config", "workdir"), ("dry_run", *_ENGINES)
    ),
    "families": Verb("which models are supported, how near to transformers", ()),
}

CONFIG = """\
Config: --config=F is a .py file of configs/ or a run's config.json, and --config.KEY=VALUE changes any key of it.
  --config.data.eval.NAME=FILE adds an eval set, --config.data.columns.ROLE=COLUMN names a column,
  --config.eval.prompts=TEXT may be repeated. specjax/config.py says what each key means.
"""
EXAMPLES = """\
Examples:
  specjax data --config=configs/sft.py --config.data.train=mine.jsonl
  specjax train --config=configs/lora.py --workdir=runs/x --config.model.path=meta-llama/Llama-3.2-1B-Instruct
  specjax generate --model=runs/x --prompt="What is VAT?"
  specjax export --workdir=runs/x --out=merged --merge
"""


def help_of_all() -> str:
    """`specjax --help`: every verb, every flag."""
    lines = ["specjax specialises a pretrained language model to a domain: full fine-tuning, SFT and LoRA, in JAX.", ""]
    wide = max(len(_usage(name)) for name in VERBS if len(_usage(name)) < WIDTH // 2) + 1
    for name, verb in VERBS.items():
        usage = _usage(name)
        lines += (
            [f"  {usage:<{wide}} {verb.does}"] if len(usage) < wide else [f"  {usage}", " " * (wide + 3) + verb.does]
        )
    lines += ["", "Flags beside these (`specjax VERB --help` has one on each line):"]
    for name, verb in VERBS.items():
        if verb.may:
            lines += _wrapped(
                f"{name}: " + ", ".join(f"{FLAGS[flag].form()} ({FLAGS[flag].told()})" for flag in verb.may)
            )
    own = f"{DISABLE}=all, or some of {', '.join(PARTS)}, in the environment"
    note = f"{own} leaves out what the command does to its own process; the Python API does none of it."
    return "\n".join([*lines, "", CONFIG, *_wrapped(note), "", EXAMPLES])


def help_of(name: str) -> str:
    """`specjax VERB --help`: what its flags do."""
    verb = VERBS[name]
    taken = [FLAGS[flag] for flag in (*verb.needs, *verb.may)]
    wide = max((len(flag.form()) for flag in taken), default=0) + 2
    lines = [" ".join(_usage(name).split()), f"  {verb.does}", ""]
    for flag in taken:
        needed = " (needed)" if flag.name in verb.needs else ""
        text = textwrap.wrap(flag.told() + needed, WIDTH - wide - 2, break_on_hyphens=False)
        lines.append(f"  {flag.form():<{wide}}{text[0]}")
        lines += [" " * (wide + 2) + line for line in text[1:]]
    lines += ["", CONFIG.rstrip("\n")] if "config" in verb.needs else []
    if name == "train":
        lines += ["", f"{DISABLE}, in the environment, leaves out what the command does to its own process: all, or"]
        lines += [line for part, does in PARTS.items() for line in _wrapped(f"  {part}: {does}")]
    return "\n".join(lines) + "\n"


def _usage(name: str) -> str:
    return " ".join([f"specjax {name:<8}", *(FLAGS[flag].form() for flag in VERBS[name].needs)])


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False, drop_whitespace=True)
