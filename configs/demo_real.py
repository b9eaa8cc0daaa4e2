"""The demo on a published model: LoRA and SFT of SmolLM2-135M-Instruct, and what it answers before and after.

    make demo-real                      # MODEL=HUB-NAME-OR-FOLDER takes another base, DATA=french the French pairs
    specjax compare --config=configs/demo_real.py --workdir=runs/real/out

The base is a 4-bit copy of the published model turned back into floats (demo/published.py): near it, not equal to it.
The pairs are questions about this Python's library with its docstrings as answers, held out by module. `general` is
specjax:general_chats: its loss, and the share of its questions that are answered word for word as there;
"Paris." is not "The capital of France is Paris.".

On 2 cores 9 min 55 s, the install and the download apart; 1.8 GiB (lora) and 3.5 GiB (sft). Nats per token, before ->
after, over 8 rows of 256 tokens each:
    domain         3.09 -> 2.38 (lora), 3.09 -> 2.40 (sft)
    general        1.14 -> 1.23 (lora), 1.14 -> 1.19 (sft); exact answers 35 % -> 14 % and 24 %
"""

from specjax.config import ConfigDict
from specjax.config import get_config as defaults

DATA = "runs/real/python"


def get_config() -> ConfigDict:
    """What the two share; `config.compare` holds that in which each differs."""
    config = defaults()
    config.steps = 16
    config.batch_size = 4
    config.accumulate = 0  # as the devices ask for: a row each on a CPU
    config.model.path = "runs/real/smollm2"
    config.data.train = f"{DATA}/pairs_train.jsonl"
    config.data.eval.domain = f"{DATA}/pairs_eval.jsonl"
    config.data.eval.general = "specjax:general_chats"
    config.data.length = 256
    config.optimizer.warmup_steps = 4
    config.eval.best = "domain"
    config.eval.batches = 8
    config.eval.prompts = (
        "What does `textwrap.dedent` do?",
        "What is `shelve.Shelf`?",
        "What is the capital of France?",
    )
    config.eval.max_new_tokens = 48
    config.log.tensorboard = False

    config.compare.lora = {"trainable": "lora", "lora": {"rank": 16}, "optimizer": {"learning_rate": 5e-4}}
    config.compare.sft = {"optimizer": {"learning_rate": 3e-5}}
    return config
