r"""Full fine-tuning: every weight trains, on raw domain text.

    specjax train --config=configs/full.py --workdir=runs/full
    specjax train --config=configs/full.py --workdir=runs/full-llama \
        --config.model.path=meta-llama/Llama-3.2-1B --config.optimizer.learning_rate=2e-5 \
        --config.data.train=mine.jsonl --config.data.length=2048

As it stands it runs on the demo's base and corpus (`make demo` writes the corpus), on 2 quiet cores:
under 3 minutes for 96 steps, 0.8 GiB; held-out loss 3.48 -> 2.89 nats per token. (The base has read these
texts, though not in this form: `configs/demo.py` measures on modules that it never saw.)

What to turn first is the learning rate. Too much of it forgets what the base knew; that shows in the loss on a general
set beside the domain's own: `--config.data.eval.domain=FILE --config.data.eval.general=FILE`.
"""

from specjax.config import ConfigDict
from specjax.config import get_config as defaults


def get_config() -> ConfigDict:
    """The defaults, but for what makes this full fine-tuning of the demo's base."""
    config = defaults()
    config.trainable = "all"
    config.batch_size = 16
    config.model.path = "demo/base"
    config.data.train = "runs/demo/data/text_train.jsonl"
    config.data.length = 256
    config.optimizer.learning_rate = 5e-4  # for the demo's 4M parameters: a tenth or less for billions
    config.optimizer.warmup_steps = 10
    config.optimizer.weight_decay = 0.01
    return config
