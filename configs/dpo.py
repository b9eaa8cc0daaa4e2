r"""DPO: of two answers to a prompt, the chosen one becomes more likely than the rejected one; an adapter trains.

    specjax train --config=configs/dpo.py --workdir=runs/dpo
    specjax train --config=configs/dpo.py --workdir=runs/dpo-llama \
        --config.model.path=meta-llama/Llama-3.2-1B-Instruct --config.optimizer.learning_rate=1e-5 \
        --config.data.train=mine.jsonl --config.data.length=2048 --config.steps=0

As it stands it runs on the demo's base and corpus (`make demo` writes the corpus), on 2 cores: 2.5 minutes for 60
steps, 1.0 GiB; held-out loss 0.693 -> 0.262 nats per pair, 92 % of the chosen answers preferred; the adapter is 1.2 MB.
The chosen answer is the question's own, the rejected one another's.

The reference is the base, asked with the adapter off: no second model. Of configs/sft.py with --config.objective=dpo,
where every weight trains, its log-probabilities are computed once before training.
`specjax export --workdir=runs/dpo --out=DIR --merge` writes a merged model.
"""

from specjax.config import ConfigDict
from specjax.config import get_config as defaults


def get_config() -> ConfigDict:
    """The defaults, but for what makes this DPO."""
    config = defaults()
    config.trainable = "lora"
    config.lora.rank = 16
    config.objective = "dpo"
    config.batch_size = 16
    config.steps = 60
    config.model.path = "demo/base"
    config.data.train = "runs/demo/data/preference_train.jsonl"
    config.data.length = 256
    config.optimizer.learning_rate = 1e-3  # for the demo's 4M parameters: 1e-5 for billions
    config.optimizer.warmup_steps = 10
    return config
