"""Text from a model: prompts into tokens, tokens into text."""
