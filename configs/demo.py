"""The demo: three methods on one base and one corpus, and what each costs and forgets.

    make demo
    specjax compare --config=configs/demo.py --workdir=runs/demo/out

The base is demo/base, 4M parameters; the corpus is this Python's own documentation, held out by module. On 2 cores,
3.5 to 4 minutes and 0.8 GiB. Nats per token on modules never seen, before -> after:
    domain   5.09 -> 5.03 (full, on the documentation's text), 5.09 -> 3.21 (sft, on answers), 5.09 -> 3.22 (lora)
    general  3.45 -> 3.59, 3.60 and 3.60 (source code)
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
    config.eval.answers = 4
    config.log.tensorboard = False

    config.compare.full = {
        "data": {"train": f"{DATA}/text_train.jsonl"},
        "optimizer": {"learning_rate": 5e-4},
    }
    config.compare.sft = {"optimizer": {"learning_rate": 3e-4}}
    config.compare.lora = {"trainable": "lora", "lora": {"rank": 16}, "optimizer": {"learning_rate": 2e-3}}
    return config
