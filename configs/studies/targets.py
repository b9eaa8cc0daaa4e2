"""Study 2: factors on all linear maps, or on the attention's alone with as many parameters.

    python benchmarks/studies.py targets
    specjax compare --config=configs/studies/targets.py --workdir=runs/studies/targets

Claim (QLoRA, Dettmers et al. 2023, arXiv:2305.14314; "LoRA Without Regret", 2025): adapting all linear maps is better
than adapting the attention's, also at equal numbers of parameters. Rank 4 on all maps and rank 10 on the attention's
train 17,920 parameters per layer each; three rates each.
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
    config.seeds = 3

    lora = {"trainable": "lora", "sweep": {"optimizer": {"learning_rate": [1e-3, 3e-3, 1e-2]}}}
    config.compare.all_maps = {**lora, "lora": {"rank": 4, "alpha": 32.0}}
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config.compare.attention = {**lora, "lora": {"rank": 10, "alpha": 32.0, "targets": attention}}
    return config
