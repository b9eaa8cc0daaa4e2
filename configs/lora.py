r"""LoRA: only low-rank factors beside the linear layers train, on the responses of instruction/response pairs.

    specjax train --config=configs/lora.py --workdir=runs/lora
    specjax train --config=configs/lora.py --workdir=runs/lora-llama \
        --config.model.path=meta-llama/Llama-3.2-1B-Instruct --config.optimizer.learning_rate=2e-4 \
        --config.data.train=mine.jsonl --config.data.length=2048

As it stands it runs on the demo's base and corpus (`make demo` writes the corpus), on 2 quiet cores:
2.5 minutes for 94 steps, 0.9 GiB; held-out loss 4.47 -> 2.53 nats per token; the adapter is 1.2 MB.

The base stays as it was, bit for bit; a checkpoint and the exported PEFT adapter are megabytes. LoRA wants a higher
learning rate than full training. `specjax export --workdir=runs/lora --out=DIR --merge` writes a merged model.
"""

from specjax.config import ConfigDict
from specjax.config import get_config as defaults


def get_config() -> ConfigDict:
    """The defaults, but for what makes this LoRA on the demo's base."""
    config = defaults()
    config.trainable = "lora"
    config.lora.rank = 16
    config.batch_size = 16
    config.model.path = "demo/base"
    config.data.train = "runs/demo/data/pairs_train.jsonl"
    config.data.length = 256
    config.optimizer.learning_rate = 2e-3  # for the demo's 4M parameters: a tenth or less for billions
    config.optimizer.warmup_steps = 10
    return config
