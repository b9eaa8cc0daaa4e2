"""Adapters, prompts and a conversation in the terminal: the parts that `specjax generate` and `chat` share."""
