"""What an export's JSON files say of the tokens that end a text: all at which `specjax.generate` stops."""

from typing import Any

import transformers

from specjax.data.ends import end_tokens
from specjax.models import Origin


def declared(origin: Origin, tokenizer: Any, eos_token: str = "") -> tuple[dict[str, Any], dict[str, Any]]:
    """`config.json` and `generation_config.json` of a model that writes with this tokenizer; as they are where they do.

    Tokens are added to those that the base's files declare, as TRL's SFTTrainer adds its `eos_token`: in front of
    `generation_config.json`'s, in which any of them ends a text, and as the one of `config.json`, where others look.

    Args:
      origin: of the model.
      tokenizer: its eos token, and the one that ends its chat template's turns, end a text; None: nothing is added.
      eos_token: another that does.
    """
    config, generation = origin.config_json, origin.generation_config
    if tokenizer is None:
        return config, generation
    found = end_tokens(tokenizer, origin.eos_ids, chat=bool(tokenizer.chat_template))
    found.sort(key=lambda token: token == tokenizer.eos_token_id)  # the end of a turn first
    found = [*([tokenizer.convert_tokens_to_ids(eos_token)] if eos_token else []), *found]
    new = [token for token in dict.fromkeys(found) if token not in origin.eos_ids]
    if not new:
        return config, generation
    own = config.get("eos_token_id")
    if not generation:  # transformers reads one out of config.json, but only where there is no file
        usual = transformers.GenerationConfig().to_dict()
        generation = {key: config[key] for key in usual if config.get(key) not in (None, usual[key])}
        generation.pop("transformers_version", None)
    return (
        config | {"eos_token_id": [*new, *own] if isinstance(own, list) else new[0]},
        generation | {"eos_token_id": [*new, *origin.eos_ids]},
    )
