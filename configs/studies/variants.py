"""Study 4: LoRA's variants, each at its own best rate.

    python benchmarks/studies.py variants
    specjax compare --config=configs/studies/variants.py --workdir=runs/studies/variants

Claim ("LoRA Without Regret", 2025; variants' own papers say otherwise: rsLoRA arXiv:2312.03732, DoRA arXiv:2402.09353,
PiSSA arXiv:2404.02948, LoRA+ arXiv:2402.12354): once each one's rate is tuned, variants are within what seeds make of
plain LoRA. Rank 8, alpha 32, three rates each, three seeds of the best.
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

    config.trainable = "lora"
    config.lora.rank, config.lora.alpha = 8, 32.0
    rates = lambda *found: {"sweep": {"optimizer": {"learning_rate": list(found)}}}  # noqa: E731
    config.compare.lora = rates(1e-3, 3e-3, 1e-2)
    config.compare.rslora = {**rates(3e-4, 1e-3, 3e-3), "lora": {"rslora": True}}
    config.compare.dora = {**rates(1e-3, 3e-3, 1e-2), "lora": {"dora": True}}
    config.compare.pissa = {**rates(3e-4, 1e-3, 3e-3), "lora": {"init": "pissa"}}
    config.compare.loraplus = {"optimizer": {"loraplus_ratio": 16.0}, **rates(3e-4, 1e-3, 3e-3)}
    return config
