r"""Supervised fine-tuning (SFT): every weight trains, on the responses of instruction/response pairs.

    specjax train --config=configs/sft.py --workdir=runs/sft
    specjax train --config=configs/sft.py --workdir=runs/sft-llama \
        --config.model.path=meta-llama/Llama-3.2-1B-Instruct --config.optimizer.learning_rate=2e-5 \
        --config.data.train=mine.jsonl --config.data.length=2048

As it stands it runs on the demo's base and corpus (`make demo` writes the corpus), on 2 quiet cores:
3 minutes for 94 steps, 0.8 GiB; held-out loss 4.47 -> 2.36 nats per token.

Only the response's tokens are learnt, its end-of-turn token among them; `specjax data --config=configs/sft.py` shows
them in colour. Rows of `{instruction, response}`, `{prompt, completion}`, `{messages}` and ShareGPT's `{conversations}`
are recognised by their columns.
"""

from specjax.config import ConfigDict
from specjax.config import get_config as defaults


def get_config() -> ConfigDict:
    """The defaults, but for what makes this SFT of the demo's base."""
    config = defaults()
    config.trainable = "all"
    config.batch_size = 16
    config.model.path = "demo/base"
    config.data.train = "runs/demo/data/pairs_train.jsonl"
    config.data.length = 256
    config.optimizer.learning_rate = 3e-4  # for the demo's 4M parameters: a tenth or less for billions
    config.optimizer.warmup_steps = 10
    config.optimizer.weight_decay = 0.01
    return config
