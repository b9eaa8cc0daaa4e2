"""Several specialisations over one base, trained in one run: each adapter is what it would be trained alone.

    specjax train --config=configs/fleet.py --workdir=runs/fleet
    specjax generate --model=demo/base --adapter=code=runs/fleet/adapters/code/export \
        --adapter=wide=runs/fleet/adapters/wide/export --prompt="What does textwrap.dedent do?"

`config.fleet` names the adapters; each entry has what is its own, and takes the rest from the config around it. Data,
evaluation sets, LoRA, rate, schedule, weight decay, clip, seed and steps may differ; base, length, batch size and mesh
are all adapters'. With `config.slots` fewer train at once, and the others take the slots of those that end.

On 2 cores, shared with other work, 5 minutes and 1.7 GiB (`make demo` writes the data). Held-out loss, nats per token:
    5.09 -> 3.28 (pairs), 3.17 (wide), 3.73 (attention); on text 4.45 -> 3.93 (code)
"""

from specjax.config import ConfigDict
from specjax.config import get_config as defaults

DATA = "runs/demo/data"


def get_config() -> ConfigDict:
    """What all share; `config.fleet` holds that in which each differs."""
    config = defaults()
    config.trainable = "lora"
    config.lora.rank = 8
    config.steps = 40
    config.batch_size = 8
    config.model.path = "demo/base"
    config.data.train = f"{DATA}/pairs_train.jsonl"
    config.data.eval.domain = f"{DATA}/pairs_eval.jsonl"
    config.data.length = 256
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 5
    config.log.tensorboard = False

    config.fleet.pairs = {}
    config.fleet.wide = {"lora": {"rank": 16, "rslora": True}, "optimizer": {"learning_rate": 1e-3}, "seed": 1}
    config.fleet.attention = {"lora": {"rank": 4, "targets": "q_proj,v_proj"}, "steps": 60}
    config.fleet.code = {
        "data": {"train": f"{DATA}/text_train.jsonl", "eval": {"domain": f"{DATA}/text_eval.jsonl"}},
        "lora": {"dropout": 0.1},
    }
    return config
