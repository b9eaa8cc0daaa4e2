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
        """What the help says of it: meaning, default, whether it may be repeated, which engines of `launch` take it."""
        engines = [engine for engine, (needs, may) in ENGINES.items() if self.name in (*needs, *may)]
        default = "" if self.type is bool or self.default in (None, "") else f"default {self.default}"
        parts = (self.does, self.more, default, "repeatable" if self.many else "")
        return "; ".join(part for part in parts if part) + (f" ({', '.join(engines)})" if engines else "")


def _flags() -> Iterator[Flag]:
    yield Flag(
        "config",
        "F",
        "the file to start from, such as --config=configs/lora.py",
        more="--config.KEY=VALUE changes any key of it",
    )
    yield Flag("workdir", "DIR", "the run's folder, such as --workdir=runs/lora")
    yield Flag("distributed", "", "this process is one of several, as `specjax launch` starts them", bool)
    yield Flag("profile", "", "write a trace of three steps into the workdir", bool)
    # generate
    yield Flag("model", "M", "a Hugging Face folder, a hub name or a run's folder, such as --model=runs/lora")
    yield Flag("adapter", "[NAME=]DIR", "a PEFT adapter over the model", many=True)
    yield Flag("prompt", "TEXT", "a prompt; - reads standard input; '@hr TEXT' asks the adapter hr alone", many=True)
    yield Flag("prompt_file", "F", 'a text file with a prompt per line, or .jsonl: {"prompt": TEXT, "adapter": NAME}')
    yield Flag("system", "TEXT", "a system message before each prompt, or of the conversation")
    yield Flag("raw", "", "apply no chat template", bool)
    yield Flag("stop", "TEXT", "end an answer at this text", many=True)
    yield Flag("seed", "N", "seed of random draws", int, 0, least=0)
    yield Flag("max_new_tokens", "N", "default: generation_config.json's, else 128", int, least=1)
    yield Flag("temperature", "X", "0 is greedy; default: generation_config.json's, else 0", float, least=0.0)
    yield Flag("top_k", "N", "draw from the N likeliest tokens", int, least=0)
    yield Flag("top_p", "X", "draw from the likeliest tokens whose probabilities sum to X", float, least=0.0, most=1.0)
    yield Flag("min_p", "X", "draw from tokens at least X times as likely as the likeliest", float, least=0.0, most=1.0)
    yield Flag("repetition_penalty", "X", "make tokens that have occurred less likely", float, least=0.0)
    yield Flag("generation_config", "false", "ignore the model's generation_config.json", bool, True)
    # export
    yield Flag(
        "out",
        "PATH",
        "what to write: a folder, such as --out=exported; of `advise` a Python file, --out=advised.py, of `report` a "
        "page, --out=report.html",
    )
    yield Flag("merge", "", "fold LoRA into the base's weights", bool)
    yield Flag("dequantise", "", "with --merge: merge into the dequantised weights of a quantised base", bool)
    yield Flag("step", "N", "the checkpoint's step; default: the best, or the last", int, least=0)
    yield Flag("overwrite", "", "replace what is in the folder", bool)
    yield Flag("dtype", "bfloat16|float32|float16", "of the files; default: that of the base's files")
    # data
    yield Flag("rows", "N,N", "show only these rows of the training data, by the numbers that a run prints")
    # advise
    yield Flag("data", "F", "what would train: a file, a folder or a hub name, such as --data=mine.jsonl")
    yield Flag(
        "hardware",
        "FAMILY:SHAPE",
        "cpu, which is this machine, found, what it has, or as --target of `specjax plan` has it, such as h100:1",
        default="cpu",
    )
    yield Flag(
        "write",
        "specjax|trl",
        "write a config for `specjax train`, or a script on transformers, TRL and PEFT",
        more="into --out, or advised.py or advised_trl.py",
    )
    yield Flag("domain", "NAME", "list public datasets of law, medicine, finance, hr, tax, code or general")
    yield Flag("check", "", "ask the hub whether each dataset is there, and its licence", bool)
    yield Flag("explain", "", "print every rule with its source and how strong the evidence is", bool)
    # combine
    yield Flag("weight", "NAME=X", "an adapter's weight, such as --weight=hr=0.7", many=True)
    yield Flag(
        "how",
        "WAY",
        "svd, cat, linear, ties, dare_linear, dare_ties or magnitude_prune; the last four also as ties_svd and so on",
        default="svd",
    )
    yield Flag("rank", "N", "rank of the new adapter, for svd and ..._svd; default: the largest rank", int, least=1)
    yield Flag("density", "X", "the share of numbers that ties, dare and magnitude_prune keep", float)
    yield Flag("majority_sign", "total|frequency", "which sign wins in ties", default="total")
    # report
    yield Flag(
        "lang",
        "en|fr",
        "of `report` and `compare` the page's language, default en; of `advise` that of the datasets, default any",
    )
    # plan
    yield Flag(
        "target",
        "FAMILY:SHAPE",
        "hardware to compile for, such as --target=v5e:4x4 or --target=cpu:8",
        many=True,
        more="v5p:2x2x4, v6e:2x4, tpu7x:2x2x1, 2*v5e:4x4 for two slices, h100:8; v5e: its smallest slice that fits",
    )
    yield Flag("json", "", "print one object per target, and nothing else", bool)
    yield Flag("search", "", "try meshes, remat and micro-batches, and rank them", bool)
    yield Flag(
        "price_per_chip_hour",
        "X",
        "print the cost per million tokens, and per epoch of the data",
        float,
        0.0,
        least=0.0,
    )
    # compare
    yield Flag("budget", "TIME", "seconds for all methods together, such as 20m or 1.5h; the steps are chosen by it")
    yield Flag("steps", "N", "steps of each run; default: the config's", int, least=1)
    yield Flag("for", "MODEL", "a model, of which config.json is enough: say the smallest hardware for each method")
    yield Flag(
        "price",
        "FAMILY=X",
        "with --for: what a chip costs per hour, such as --price=v5e=1.2, to say what a million tokens cost",
        many=True,
        more="--price=h100=2.5 beside it",
    )
    # launch
    yield Flag("on", "ENGINE", "what starts the processes: --on=local:N, gcloud-tpu, gke or slurm")
    yield Flag("dry_run", "", "print what would be started, and start nothing", bool)
    yield Flag("name", "TEXT", "the machine's or the job's name")
    yield Flag("zone", "TEXT", "the machine's zone")
    yield Flag("project", "TEXT", "the Google Cloud project")
    yield Flag("image", "TEXT", "the container's image")
    yield Flag("accelerator", "TEXT", "GKE's name of the TPU")
    yield Flag("topology", "TEXT", "the slice's chips, such as 4x4")
    yield Flag("namespace", "TEXT", "the Kubernetes namespace")
    yield Flag("bucket", "TEXT", "a bucket to mount at /bucket")
    yield Flag("service_account", "TEXT", "the Kubernetes service account")
    yield Flag("time", "TEXT", "the job's time limit")
    yield Flag("partition", "TEXT", "the cluster's partition")
    yield Flag("account", "TEXT", "the account that pays")
    yield Flag("setup", "TEXT", "shell commands that run before the command")
    yield Flag("nodes", "N", "machines", int, least=1)
    yield Flag("gpus_per_node", "N", "processes on each machine", int, least=1)
    yield Flag("slices", "N", "TPU slices; default 1", int, least=1)
    yield Flag("restarts", "N", "restarts after failures; default 10", int, least=1)


FLAGS = {flag.name: flag for flag in _flags()}


@dataclasses.dataclass(frozen=True)
class Verb:
    """What a verb does, the flags that it needs, those that it may have, and examples of it.

    `keys`: a pattern of the config's keys that it takes without a config file.
    """

    does: str
    needs: tuple[str, ...]
    may: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()
    keys: str = ""


_DRAWING = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "generation_config")
_ENGINES = sorted({name for needs, may in ENGINES.values() for name in (*needs, *may)})
VERBS = {
    "train": Verb(
        "train; called again on the same workdir, resume",
        ("config", "workdir"),
        ("distributed", "profile"),
        (
            "--config=configs/lora.py --workdir=runs/lora",
            "--config=configs/sft.py --workdir=runs/mine --config.model.path=meta-llama/Llama-3.2-1B-Instruct "
            "--config.data.train=mine.jsonl --config.optimizer.learning_rate=1e-5",
        ),
    ),
    "eval": Verb(
        "print a run's loss, perplexity and token accuracy on named sets",
        ("config", "workdir"),
        ("distributed",),
        (
            "--config=configs/lora.py --workdir=runs/lora",
            "--config=configs/lora.py --workdir=runs/lora --config.data.eval.domain=domain.jsonl",
        ),
    ),
    "generate": Verb(
        "print what a model, a run or several adapters answer to --prompt=TEXT",
        ("model",),
        ("adapter", "prompt", "prompt_file", "raw", "system", "stop", "seed", *_DRAWING, "distributed"),
        (
            "--model=runs/lora --prompt='What is VAT?'",
            "--model=meta-llama/Llama-3.2-1B-Instruct --adapter=hr=runs/hr/export --adapter=tax=runs/tax/export "
            "--prompt='@hr Who approves leave?' --prompt='What is VAT?'",
        ),
    ),
    "chat": Verb(
        "talk to a model, a run or several adapters in the terminal",
        ("model",),
        ("adapter", "system", "stop", "seed", *_DRAWING),
        (
            "--model=runs/lora",
            "--model=meta-llama/Llama-3.2-1B-Instruct --adapter=hr=runs/hr/export --adapter=tax=runs/tax/export",
        ),
    ),
    "export": Verb(
        "write a run's result: a Hugging Face folder, or a PEFT adapter",
        ("workdir", "out"),
        ("merge", "dequantise", "step", "overwrite", "dtype", "distributed"),
        ("--workdir=runs/lora --out=merged --merge", "--workdir=runs/lora --out=adapter-200 --step=200"),
    ),
    "data": Verb(
        "show what the model will see: counts, dropped rows, the trained tokens in colour",
        ("config",),
        ("rows",),
        ("--config=configs/sft.py --config.data.train=mine.jsonl", "--config=configs/lora.py --rows=3,14"),
    ),
    "advise": Verb(
        "say which method and settings to start from, for your data, model and hardware",
        (),
        ("data", "model", "hardware", "write", "out", "explain", "domain", "lang", "check"),
        (
            "--data=mine.jsonl --model=meta-llama/Llama-3.2-1B-Instruct --hardware=h100:1 --out=advised.py",
            "--domain=law --lang=fr",
        ),
        r"seed|model\.revision|data\.((eval|columns)\.\w+|eval_fraction|template|format|turns|split|packing|overlong|cache)",
    ),
    "combine": Verb(
        "make one PEFT adapter of several, each with its weight",
        ("model", "adapter", "weight", "out"),
        ("how", "rank", "density", "majority_sign", "seed", "overwrite", "distributed"),
        (
            "--model=M --adapter=hr=runs/hr/export --adapter=tax=runs/tax/export --weight=hr=0.7 --weight=tax=0.3 "
            "--out=both",
            "--model=M --adapter=a=A --adapter=b=B --weight=a=1 --weight=b=1 --how=ties --density=0.5 --out=both",
        ),
    ),
    "compare": Verb(
        "run methods on your data, each at its own best rate, and say which to take",
        ("config", "workdir"),
        ("budget", "steps", "for", "price", "lang"),
        (
            "--config=configs/compare.py --workdir=runs/compare --config.data.train=mine.jsonl --budget=20m",
            "--config=configs/demo.py --workdir=runs/compare --config.compare.lora.lora.rank=4 "
            "--for=meta-llama/Llama-3.1-8B --price=v5e=1.2 --price=h100=2.5",
        ),
    ),
    "report": Verb(
        "write the page of a comparison anew, from its folder's report.json",
        ("workdir",),
        ("lang", "out"),
        ("--workdir=runs/compare", "--workdir=runs/compare --lang=fr --out=rapport.html"),
    ),
    "plan": Verb(
        "say whether a job fits and how fast it can be, without the devices",
        ("config", "target"),
        ("json", "search", "price_per_chip_hour"),
        (
            "--config=configs/lora.py --target=v5e:4x4 --config.model.path=llama --config.batch_size=16",
            "--config=configs/full.py --target=h100:8 --search --price_per_chip_hour=3",
        ),
    ),
    "launch": Verb(
        "train in several processes, on one machine or on many",
        ("on", "config", "workdir"),
        ("dry_run", *_ENGINES),
        (
            "--on=local:2 --config=configs/lora.py --workdir=runs/two",
            "--on=slurm --nodes=2 --gpus_per_node=8 --config=configs/lora.py --workdir=/shared/runs/x --dry_run",
        ),
    ),
    "families": Verb("list the supported models, and how near they are to transformers", (), (), ("",)),
    "env": Verb("print versions, devices and settings, for a bug report", (), (), ("",)),
}

EXAMPLES = """\
Examples:
  specjax data --config=configs/sft.py --config.data.train=mine.jsonl
  specjax train --config=configs/lora.py --workdir=runs/x --config.model.path=meta-llama/Llama-3.2-1B-Instruct
  specjax generate --model=runs/x --prompt="What is VAT?"
  specjax export --workdir=runs/x --out=merged --merge
"""
MORE = """\
  specjax VERB --help             the flags of a verb, with defaults and examples
  specjax help config             every key of a config, with its default; `specjax help config.lora`: those of a group
"""


def help_of_all() -> str:
    """`specjax --help`: every verb on a line."""
    wide = max(map(len, VERBS)) + 1
    return "\n".join(
        (
            "specjax specialises a pretrained language model to a domain: full fine-tuning, SFT, LoRA and DPO, in JAX.",
            "",
            *(f"  specjax {name:<{wide}} {verb.does}" for name, verb in VERBS.items()),
            "",
            MORE,
            "A config is a .py file of configs/ or a run's config.json; --config.KEY=VALUE changes any key of it.",
            "A mistake ends with exit status 2 and one sentence: what, where, what to do.",
            "",
            EXAMPLES,
        )
    )


def help_of(name: str) -> str:
    """`specjax VERB --help`: usage, its flags with their defaults, examples."""
    verb = VERBS[name]
    taken = [FLAGS[flag] for flag in (*verb.needs, *verb.may)]
    wide = max((len(flag.form()) for flag in taken), default=0) + 2
    needs = [FLAGS[flag].form() for flag in verb.needs]
    lines = [" ".join(["specjax", name, *needs, *(["[FLAGS]"] if verb.may else [])]), f"  {verb.does}"]
    lines += [""] if taken else []
    for flag in taken:
        needed = " (needed)" if flag.name in verb.needs else ""
        text = textwrap.wrap(flag.told() + needed, WIDTH - wide - 2, break_on_hyphens=False)
        lines.append(f"  {flag.form():<{wide}}{text[0]}")
        lines += [" " * (wide + 2) + line for line in text[1:]]
    if "config" in verb.needs:
        lines += [
            "",
            "--config.data.eval.NAME=FILE adds an eval set, --config.data.columns.ROLE=COLUMN names a column,",
        ]
        lines += ["--config.eval.prompts=TEXT may be repeated. `specjax help config` has every key and its default."]
    if verb.keys:
        lines += ["", "--config.data.KEY=VALUE says how the data are read, as in a config; `specjax help config.data`."]
    if name == "train":
        lines += ["", f"{DISABLE}, in the environment, leaves out what the command does to its own process: all, or"]
        lines += [line for part, does in PARTS.items() for line in _wrapped(f"  {part}: {does}", "    ")]
    lines += ["", "Examples:"]
    for example in verb.examples:
        lines += _wrapped(f"  specjax {name} {example}".rstrip(), "      ", " \\")
    return "\n".join(lines) + "\n"


def _wrapped(text: str, indent: str, ending: str = "") -> list[str]:
    """Lines of at most `WIDTH`, those behind the first indented, all but the last with `ending`."""
    lines = textwrap.wrap(
        text, WIDTH - len(ending), subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
    )
    return [line + ending for line in lines[:-1]] + lines[-1:]
