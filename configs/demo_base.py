"""The demo's base model: a Llama of 3.8M parameters, trained from nothing on the standard library.

    make demo-base

demo/base_config holds its config.json and its tokenizer; what the run exports is what demo/base is. The modules and
topics that the demo asks about are held out here too. On 2 cores, shared with other work: 56 minutes, 1.6 GiB.
Held-out loss 8.36 -> 3.45 nats per token (perplexity 31.6) after 3,543 steps, 7.2M tokens.
"""

from specjax.config import ConfigDict
from specjax.config import get_config as defaults


def get_config() -> ConfigDict:
    """Training from random weights: a high rate, a warmup, weight decay, small batches for many updates."""
    config = defaults()
    config.trainable = "all"
    config.epochs = 3.0
    config.batch_size = 8
    config.model.path = "demo/base_config"
    config.model.init = "random"
    config.model.dtype = "float32"
    config.data.train = "runs/demo/data/base_train.jsonl"
    config.data.eval.heldout = "runs/demo/data/base_eval.jsonl"
    config.data.length = 256
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 200
    config.optimizer.weight_decay = 0.1
    config.optimizer.b2 = 0.95
    config.eval.every = 1000
    config.log.every = 20
    return config
