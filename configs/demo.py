"""The demo: three methods on one base and one corpus, and what each costs and forgets.

    make demo
    specjax compare --config=configs/demo.py --workdir=runs/demo/out

The base is demo/base, 4M parameters; the corpus is this Python's own documentation, held out by module. 2 cores:
MEASURED: total time, peak memory
MEASURED: the table (method: domain loss before -> after, general loss before -> after)
"""

from specjax.config import ConfigDict
from specjax.config import get_config as defaults

DATA = "runs/demo/data"


def get_config() -> ConfigDict:
    """What the three share; `config.compare` holds that in which each differs."""
    config = defaults()
    config.steps = 40
    config.batch_size = 8
    config.model.path = "demo/base"
    config.model.dtype = "float32"
    config.data.train = f"{DATA}/pairs_train.jsonl"
    config.data.eval.domain = f"{DATA}/pairs_eval.jsonl"
    config.data.eval.general = f"{DATA}/general_eval.jsonl"
    config.data.length = 256
    config.optimizer.warmup_steps = 5
    config.eval.best = "domain"
    config.eval.prompts = ("What does `textwrap.dedent` do?",)
    config.eval.max_new_tokens = 48
    config.log.tensorboard = False

    config.compare.full = {
        "data": {"train": f"{DATA}/text_train.jsonl", "eval": {"domain": f"{DATA}/text_eval.jsonl"}},
        "optimizer": {"learning_rate": 5e-4},
    }
    config.compare.sft = {"optimizer": {"learning_rate": 3e-4}}
    config.compare.lora = {"trainable": "lora", "lora": {"rank": 16}, "optimizer": {"learning_rate": 2e-3}}
    return config
