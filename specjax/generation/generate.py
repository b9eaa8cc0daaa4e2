"""Text from a model: batched prompts of unequal length, a KV cache, greedy or sampled.

Token for token what `transformers.generate` writes for each prompt alone. Sizes are rounded up to powers of two, so
that few programs are compiled; `specjax.generation.decoding` is what runs on the device.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import jax
import numpy as np

from specjax import sharding
from specjax.data.chat import plain_ids
from specjax.errors import UserError
from specjax.generation import decoding
from specjax.generation.batches import Setup, bucket, rows_of, texts_of
from specjax.generation.pools import Adapters, pools
from specjax.generation.prompts import cut, decode, end_tokens, render, settled
from specjax.generation.sampling import Sampling
from specjax.models import Decoder

LOOK_EVERY = 16  # tokens between two looks for stop strings in the text so far


def generate(
    model: Decoder,
    tokenizer: Any,
    prompts: Sequence[str | Sequence[Mapping[str, str]]],
    *,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int = 0,
    stop: Sequence[str] | None = None,
    chat: bool = False,
    system: str | None = None,
    adapter: Adapters = ...,
    batch_size: int = 16,
    generation_config: Mapping[str, Any] | None = None,
    said: Callable[[int, str], None] | None = None,
) -> list[str]:
    """What the model writes after each prompt, up to a token of `end_tokens`, a stop string, or its limit.

    What is not given is what the model's `generation_config.json` says, and else: 128 tokens, the likeliest each time;
    where tokens are drawn, temperature 1 and top_k 50 (transformers' defaults).

    Args:
      model: the model.
      tokenizer: its tokenizer.
      prompts: the texts to continue as they are; with `chat`, what the user says, or a conversation that ends with it:
        messages, each {"role": ..., "content": ...}.
      max_new_tokens: the limit.
      temperature: 0 takes the likeliest token; otherwise the logits are divided by it and a token is drawn.
      top_k: draw from this many of the likeliest tokens; 0: from all.
      top_p: draw from the fewest of the likeliest tokens whose probabilities sum to this; 1: from all.
      min_p: draw from the tokens at least this many times as probable as the likeliest; 0: from all.
      repetition_penalty: above 1, tokens that the prompt or the text holds become less likely; 1: off.
      seed: of the draws; prompt i draws the same in whatever batch it is.
      stop: strings that end a text and are cut off, whatever tokens they are made of; [] for none. Default
        `stop_strings` of the file.
      chat: render each prompt as a user's turn through the tokenizer's chat template.
      system: the system turn before it.
      adapter: the LoRA adapter to answer with, None for the base alone; default the one in use. A list has one for each
        prompt, ["hr", "tax", None, ...]: such prompts share batches, each row with its own adapter. Loading, unloading
        and choosing adapters then compiles nothing while they fit what there was room for (`specjax.lora.reserve`).
        Adapters with DoRA, or with copies of whole modules (`modules_to_save`, `bias`) or of rows, can't share: their
        prompts are answered in batches of their own, by a program of their own.
      batch_size: prompts at a time.
      generation_config: stands for the model's file; {} leaves it out, but for its end tokens.
      said: told a prompt's number and its text so far after every token, but for the last ones; it may raise.

    Raises:
      UserError: a prompt that is empty or too long, no chat template, an option out of range, no such adapter or
        another number of them than of prompts, or a `generation_config.json` that asks for something that is not done
        here.
    """
    if tokenizer is None:
        raise UserError("the model has no tokenizer: give one, or use generate_tokens with token ids.")
    if isinstance(prompts, str):
        raise UserError("prompts is one string where a list of strings is wanted: write [prompt].")
    if system is not None and not chat:
        raise UserError("a system text needs a chat to stand in: give chat=True with it, or leave it out.")
    file = model.origin.generation_config if generation_config is None else generation_config
    if stop is None:
        named = file.get("stop_strings") or ()
        stop = [named] if isinstance(named, str) else named
    if isinstance(stop, str) or "" in stop:
        raise UserError(f"stop is {stop!r}: it must be a list of strings, none of them empty.")
    sampling = Sampling.of(
        file,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    if not prompts:
        return []
    plain = [prompt for prompt in prompts if isinstance(prompt, str)]
    if not chat and len(plain) < len(prompts):
        raise UserError("a prompt is a conversation, which a chat template renders: give chat=True, or a text.")
    rows = render(tokenizer, prompts, system) if chat else [ids.tolist() for ids in plain_ids(tokenizer, plain)]
    # Some tokenizers drop a text's first space: a continuation is what it adds to its prompt, an answer stands alone.
    heads = [[] if chat else row for row in rows]

    def text(row: int, new: Sequence[int]) -> str:
        return decode(tokenizer, heads[row], new)

    def ended(row: int, new: Sequence[int]) -> bool:
        so_far = text(row, new)
        if said is not None:
            said(row, settled(so_far, stop))
        return any(one in so_far for one in stop)

    special = tokenizer.get_added_vocab()
    found = generate_tokens(
        model,
        rows,
        **vars(sampling),
        seed=seed,
        eos_ids=[*end_tokens(model, tokenizer, chat=chat), *(special[text] for text in stop if text in special)],
        ended=ended if said is not None or set(stop).difference(special) else None,
        **({} if said is None else {"every": 1}),
        adapter=adapter,
        batch_size=batch_size,
    )
    return [cut(text(row, new), stop) for row, new in enumerate(found)]


def generate_tokens(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    eos_ids: Sequence[int] = (),
    ended: Callable[[int, list[int]], bool] | None = None,
    every: int = LOOK_EVERY,
    adapter: Adapters = ...,
    batch_size: int = 16,
) -> list[list[int]]:
    """The ids that follow each prompt's ids, up to the first of `eos_ids`, which is left out.

    The rest is as in `generate`, but nothing is read from the model's files. On a mesh, the rows of a batch are split
    over `data` and `fsdp`; empty rows fill it up where they do not divide it.

    Args:
      model: the model.
      prompts: ids.
      max_new_tokens: the limit; for the others see `generate`.
      temperature: 0 for the likeliest.
      top_k: 0 is off.
      top_p: 1 is off.
      min_p: 0 is off.
      repetition_penalty: 1 is off.
      seed: of the draws.
      eos_ids: tokens that end a text.
      ended: told a prompt's number and its new ids, now and then: whether that text needs no more of them.
      every: how many tokens apart `ended` is asked.
      adapter: the LoRA adapter, or one for each prompt.
      batch_size: prompts at a time.

    Raises:
      UserError: a prompt that is empty or too long, an option out of range, no such adapter.
    """
    Sampling(max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty)  # checks them
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}: it must be at least 1.")
    _check_prompts(prompts, max_new_tokens, model.config.max_positions, model.config.vocab_size)
    if not prompts:
        return []
    mesh = sharding.mesh_of(model.norm.scale[...])
    ways = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in sharding.RULES["batch"])
    stop = np.full(bucket(len(eos_ids), 8), -1, np.int32)  # -1 is no token
    stop[: len(eos_ids)] = eos_ids
    choice = decoding.Choice(
        stop=stop,
        seed=np.uint32(seed % 2**32),
        temperature=np.float32(temperature),
        top_k=np.int32(top_k),
        top_p=np.float32(top_p),
        min_p=np.float32(min_p),
        repetition_penalty=np.float32(repetition_penalty),
    )
    turn = min((r.original_max_positions for r in model.config.ropes if r.kind == "longrope"), default=math.inf)
    found: list[list[int]] = [[] for _ in prompts]
    for pool in pools(model, adapter, len(prompts)):
        waiting = list(pool.prompts)
        size = ways * bucket(math.ceil(min(batch_size, len(waiting)) / ways))
        setup = Setup.of(pool.model, size, choice)
        while waiting:
            waiting.sort(key=lambda i: len(prompts[i]) + len(found[i]))
            chosen, waiting = waiting[:size], waiting[size:]
            texts = [[*prompts[i], *found[i]] for i in chosen]
            left = [max_new_tokens - len(found[i]) for i in chosen]
            # A text that outgrows longrope's short factors is read anew, to be rotated by the long ones from its start.
            limits = [
                min(n, int(turn) + 1 - len(text)) if len(text) <= turn < math.inf else n
                for n, text in zip(left, texts, strict=True)
            ]
            rows = rows_of(texts, size, chosen, limits, [len(found[i]) for i in chosen])
            look = None if ended is None else _look(ended, chosen, found)
            if pool.slots is not None:
                setup = setup.bearing(pool.model, pool.slots[[*chosen, *chosen[:1] * (size - len(chosen))]])
            with nullcontext() if mesh is None else jax.set_mesh(mesh):
                new = texts_of(setup, rows, bucket(max(limits), 16), look, every)
            for i, row, limit, n in zip(chosen, new, limits, left, strict=False):
                found[i] += row
                if len(row) == limit < n and not (ended and ended(i, found[i])):
                    waiting.append(i)
    return found


def _look(
    ended: Callable[[int, list[int]], bool], chosen: Sequence[int], before: Sequence[list[int]]
) -> Callable[[int, list[int]], bool]:
    """`ended` of a batch's rows, whose texts may have begun in an earlier batch."""
    return lambda row, new: ended(chosen[row], before[chosen[row]] + new)


def _check_prompts(prompts: Sequence[Sequence[int]], new: int, longest: int, vocab: int) -> None:
    for number, prompt in enumerate(prompts, 1):
        if not len(prompt):
            raise UserError(
                f"prompt {number} is empty, and no begin-of-text token stands before it: give it some text."
            )
        if len(prompt) + new > longest:
            raise UserError(
                f"prompt {number} has {len(prompt)} tokens and max_new_tokens is {new}, together more than the model's "
                f"{longest} positions: shorten the prompt or ask for fewer tokens."
            )
        if max(prompt) >= vocab:
            raise UserError(
                f"prompt {number} has token {max(prompt)} and the model knows {vocab}: give the model's own tokenizer."
            )
