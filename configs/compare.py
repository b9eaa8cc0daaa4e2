r"""Which method for your data: full fine-tuning, SFT and LoRA of two ranks, each at its own best rate.

    specjax compare --config=configs/compare.py --workdir=runs/compare --budget=20m \
        --config.model.path=meta-llama/Llama-3.2-1B-Instruct --config.data.train=mine.jsonl

Model and rows are all that must be given; as it stands it runs on the demo's base and corpus (`make demo` writes the
corpus). A part of the rows is held out, the same for all methods, and what is forgotten is measured on two small
general sets that come with specjax, unless `config.data.eval` names sets. `full` learns every token of the rows, the
questions too; raw text of the domain is given to it alone by `--config.compare.full.data.train=FILE`.

The rates are three, a factor of 3 apart, around the published rule: for every weight by the model's width, for LoRA 10
times that (`specjax advise --explain`, rules `rate` and `times`). The worse ones stop at a quarter and at half of the
steps. `--config.seeds=3` trains the best rate of each with two further seeds, for an interval.
"""

from specjax.config import ConfigDict
from specjax.config import get_config as defaults


def get_config() -> ConfigDict:
    """What the methods share; `config.compare` holds that in which each differs."""
    config = defaults()
    config.steps = 120
    config.batch_size = 8
    config.accumulate = 0  # as the devices ask for
    config.model.path = "demo/base"
    config.data.train = "runs/demo/data/pairs_train.jsonl"
    config.data.length = 256
    config.optimizer.warmup_steps = 12
    config.eval.every = 30
    config.eval.answers = 12
    config.log.tensorboard = False

    rates = {"sweep": {"optimizer": {"learning_rate": "auto"}}, "rungs": (0.25, 0.5)}
    lora = {"trainable": "lora", **rates}
    config.compare.full = {"data": {"loss": "all"}, **rates}
    config.compare.sft = {**rates}
    config.compare.lora_r8 = {**lora, "lora": {"rank": 8, "alpha": 32.0}}
    config.compare.lora_r16 = {**lora, "lora": {"rank": 16, "alpha": 32.0}}
    return config
