"""Study 3: what LoRA and full fine-tuning forget where they have learned as much, and what replay does.

    python benchmarks/studies.py forgetting
    specjax compare --config=configs/studies/forgetting.py --workdir=runs/studies/forgetting

Claims ("LoRA Learns Less and Forgets Less", Biderman et al. 2024, arXiv:2405.09673; Scialom et al. 2022,
arXiv:2205.12393): LoRA forgets less than full fine-tuning, and general rows among the domain's hold forgetting down.
Answers alone train; forgetting is the rise of the loss on source code, of which the base has seen much. A fifth of the
tokens is replay.
Not run yet: some 15 minutes on 2 cores and 1.5 GiB are to be expected, by the study `rates`.
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
    config.seeds = 1

    replay = {"data": {"train": [(f"{DATA}/pairs_train.jsonl", 0.8), (f"{DATA}/base_train.jsonl", 0.2)]}}
    full = {"sweep": {"optimizer": {"learning_rate": [1e-4, 3e-4, 1e-3]}}}
    lora = {
        "trainable": "lora",
        "lora": {"rank": 8, "alpha": 32.0},
        "sweep": {"optimizer": {"learning_rate": [1e-3, 3e-3, 1e-2]}},
    }
    config.compare.full = full
    config.compare.lora = lora
    config.compare.full_replay = {**full, **replay}
    config.compare.lora_replay = {**lora, **replay}
    return config
