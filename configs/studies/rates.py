"""Study 1: LoRA's best learning rate beside full fine-tuning's, and whether it depends on the rank.

    python benchmarks/studies.py rates
    specjax compare --config=configs/studies/rates.py --workdir=runs/studies/rates

Claims ("LoRA Without Regret", Schulman and Thinking Machines Lab, 2025): the best rate of LoRA is about ten times that
of full fine-tuning, and hardly depends on the rank where alpha is held fixed. Full training of every weight and LoRA of
ranks 2, 8 and 32 at alpha 32, five rates each, a factor of 3 apart, all to their end: no trial stops early.
Without other work some 15 minutes on 2 cores (1,285 CPU seconds), 1.5 GiB. To expect: best rates of 2.5e-4 (full) and
2.6e-3 to 3.0e-3 (LoRA), and losses of 3.12 to 3.17 nats.
"""

from specjax.config import ConfigDict
from specjax.config import get_config as defaults

DATA = "runs/demo/data"


def get_config() -> ConfigDict:
    """What the methods share; `config.compare` holds that in which each differs."""
    config = defaults()
    config.steps = 100
    config.batch_size = 4
    config.model.path = "demo/base"
    config.model.dtype = "float32"
    config.data.train = f"{DATA}/pairs_train.jsonl"
    config.data.eval.domain = f"{DATA}/pairs_eval.jsonl"
    config.data.eval.general = f"{DATA}/general_eval.jsonl"
    config.data.length = 256
    config.optimizer.warmup_steps = 10
    config.eval.best = "domain"
    config.eval.every = 20
    config.eval.answers = 0
    config.eval.exact = ()
    config.log.tensorboard = False
    config.export = False
    config.seeds = 2

    lora = {"trainable": "lora", "sweep": {"optimizer": {"learning_rate": [3e-4, 1e-3, 3e-3, 1e-2, 3e-2]}}}
    config.compare.full = {"sweep": {"optimizer": {"learning_rate": [3e-5, 1e-4, 3e-4, 1e-3, 3e-3]}}}
    for rank in (2, 8, 32):
        config.compare[f"lora_r{rank}"] = {**lora, "lora": {"rank": rank, "alpha": 32.0}}
    return config
