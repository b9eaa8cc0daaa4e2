"""Which rate and rank: eight LoRA adapters over one base, of which the worse ones stop on the way.

    specjax train --config=configs/sweep.py --workdir=runs/sweep

Every combination of `config.sweep` is an adapter of a fleet (`configs/fleet.py`). At the shares of the steps that
`config.rungs` has, the half with the smaller held-out loss goes on: of eight adapters one is trained to its end.

On 2 cores, shared with other work, 4 minutes and 1.0 GiB (`make demo` writes the data). 4e-3 at rank 16 is left at the
end: held-out loss 5.09 -> 3.10 nats per token after 80 steps; the last that it beat, 2e-3 at rank 16, 3.18 after 40.
"""

from specjax.config import ConfigDict
from specjax.config import get_config as defaults


def get_config() -> ConfigDict:
    """What all share, and what is tried."""
    config = defaults()
    config.trainable = "lora"
    config.lora.rank = 8
    config.steps = 80
    config.batch_size = 8
    config.model.path = "demo/base"
    config.data.train = "runs/demo/data/pairs_train.jsonl"
    config.data.eval.domain = "runs/demo/data/pairs_eval.jsonl"
    config.data.length = 256
    config.optimizer.warmup_steps = 5
    config.log.tensorboard = False

    config.sweep.optimizer = {"learning_rate": [5e-4, 1e-3, 2e-3, 4e-3]}
    config.sweep.lora = {"rank": [8, 16]}
    config.rungs = (0.125, 0.25, 0.5)
    return config
