"""Text from a model: batched prompts of unequal length, a KV cache, greedy or sampled.

Token for token what `transformers.generate` writes for each prompt alone. Sizes are rounded up to powers of two, so
that few programs are compiled; `specjax.generation.decoding` is what runs on the device.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from types import EllipsisType
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from specjax import sharding
from specjax.data.chat import plain_ids
from specjax.errors import UserError
from specjax.generation import decoding
from specjax.generation.prompts import cut, decode, end_tokens, render
from specjax.generation.sampling import Sampling
from specjax.lora.adapters import slot_of
from specjax.models import Decoder
from specjax.models.adapter import select

LOOK_EVERY = 16  # tokens between two looks for stop strings in the text so far


def generate(
    model: Decoder,
    tokenizer: Any,
    prompts: Sequence[str],
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
    adapter: str | EllipsisType | None = ...,
    batch_size: int = 16,
    generation_config: Mapping[str, Any] | None = None,
) -> list[str]:
    """What the model writes after each prompt, up to a token of `end_tokens`, a stop string, or its limit.

    What is not given is what the model's `generation_config.json` says, and else: 128 tokens, the likeliest each time;
    where tokens are drawn, temperature 1 and top_k 50 (transformers' defaults).

    Args:
      model: the model.
      tokenizer: its tokenizer.
      prompts: the texts to continue as they are; with `chat`, what the user says.
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
      adapter: the LoRA adapter to answer with, None for the base alone; default the one in use.
      batch_size: prompts at a time.
      generation_config: stands for the model's file; {} leaves it out, but for its end tokens.

    Raises:
      UserError: a prompt that is empty or too long, no chat template, an option out of range, no such adapter, or a
        `generation_config.json` that asks for something that is not done here.
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
    rows = render(tokenizer, prompts, system) if chat else [ids.tolist() for ids in plain_ids(tokenizer, prompts)]
    # Some tokenizers drop a text's first space: a continuation is what it adds to its prompt, an answer stands alone.
    heads = [[] if chat else row for row in rows]

    def text(row: int, new: Sequence[int]) -> str:
        return decode(tokenizer, heads[row], new)

    special = tokenizer.get_added_vocab()
    found = generate_tokens(
        model,
        rows,
        **vars(sampling),
        seed=seed,
        eos_ids=[*end_tokens(model, tokenizer, chat=chat), *(special[text] for text in stop if text in special)],
        ended=(lambda row, new: any(one in text(row, new) for one in stop)) if set(stop).difference(special) else None,
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
    adapter: str | EllipsisType | None = ...,
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
      ended: told a prompt's number and its new ids, every few tokens: whether that text needs no more of them.
      adapter: the LoRA adapter.
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
    size = ways * _bucket(math.ceil(min(batch_size, len(prompts)) / ways))
    stop = np.full(_bucket(len(eos_ids), 8), -1, np.int32)  # -1 is no token
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
    graph, state = _split(model, adapter)
    stacks = [state["layers"][segment] for segment in range(len(model.config.segments))]
    setup = _Setup(graph, state, unstacked(stacks), _head(nnx.merge(graph, state), size), choice)
    turn = min((r.original_max_positions for r in model.config.ropes if r.kind == "longrope"), default=math.inf)
    found: list[list[int]] = [[] for _ in prompts]
    waiting = list(range(len(prompts)))
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
        rows = _rows(texts, size, chosen, limits, [len(found[i]) for i in chosen])
        look = None if ended is None else _look(ended, chosen, found)
        with nullcontext() if mesh is None else jax.set_mesh(mesh):
            new = _continue(setup, rows, _bucket(max(limits), 16), look)
        for i, row, limit, n in zip(chosen, new, limits, left, strict=False):
            found[i] += row
            if len(row) == limit < n and not (ended and ended(i, found[i])):
                waiting.append(i)
    return found


class _Setup(NamedTuple):
    """A model split for `decoding`, and what is asked of it."""

    graph: Any
    state: Any
    layers: Any
    head: Any
    choice: decoding.Choice


def _continue(
    setup: _Setup, rows: decoding.Rows, new: int, look: Callable[[int, list[int]], bool] | None
) -> list[list[int]]:
    """The new ids of each row, up to its end, its limit, or (looked at every few tokens) where `look` says enough."""
    graph, state, layers, head, choice = setup
    greedy, until = bool(choice.temperature == 0), 0
    progress = decoding.prefill(state, rows, graph=graph, new=new, penalised=bool(choice.repetition_penalty != 1))
    few = 0 if greedy or not choice.top_k else _bucket(int(choice.top_k), 64)
    while True:
        until = new if look is None else min(until + LOOK_EVERY, new)
        static = {"graph": graph, "greedy": greedy, "few": few}
        progress = decoding.decode(state, layers, head, progress, rows, choice, np.int32(until), **static)
        done, found = np.array(progress.done), [row[row >= 0].tolist() for row in np.array(progress.out)]
        if look is None or until == new or done.all():
            return found
        done |= [not over and look(row, found[row]) for row, over in enumerate(done)]
        progress = progress._replace(done=jax.device_put(done, progress.done.sharding))


def _look(
    ended: Callable[[int, list[int]], bool], chosen: Sequence[int], before: Sequence[list[int]]
) -> Callable[[int, list[int]], bool]:
    """`ended` of a batch's rows, whose texts may have begun in an earlier batch."""
    return lambda row, new: ended(chosen[row], before[chosen[row]] + new)


def _rows(
    texts: Sequence[Sequence[int]], size: int, indices: Sequence[int], limits: Sequence[int], made: Sequence[int]
) -> decoding.Rows:
    """A batch of `size` rows, the last of them empty where there are fewer texts."""
    tokens = np.zeros((size, _bucket(max(map(len, texts)) - 1, 32) + 1), np.int32)
    rows = decoding.Rows(tokens, *np.zeros((4, size), np.int32))
    for row, text in enumerate(texts):
        tokens[row, -len(text) :], rows.lengths[row] = text, len(text)
        rows.indices[row], rows.limits[row], rows.made[row] = indices[row], limits[row], made[row]
    return rows


def unstacked(segments: Sequence[Any]) -> list[list[Any]] | None:
    """The stacked parameters of each segment layer by layer, views of the same memory; None but on a single CPU device.

    A scan hands its body slices. XLA's CPU backend copies each slice before it multiplies, which doubles the time of a
    decoding step; other backends read them in place.
    """
    first = jax.tree.leaves(segments)[0]
    if not _on_cpu(first) or len(first.devices()) > 1:
        return None
    found = []
    for stack in segments:
        views = jax.tree.map(np.asarray, stack)
        count = len(jax.tree.leaves(views)[0])
        found.append([jax.tree.map(lambda x, i=i: jax.device_put(x[i]), views) for i in range(count)])
    return found


def _on_cpu(array: jax.Array) -> bool:
    return next(iter(array.devices())).platform == "cpu"


def _head(model: Decoder, rows: int) -> jax.Array | None:
    """The output layer's table transposed, where that pays: XLA's CPU backend would do it at every step.

    Not for one row, which it multiplies by the table as it lies; nor under an adapter's factors, which want the table.
    """
    table = model.output_table()
    return decoding.transposed(table, model.dtype) if rows > 1 and table is not None and _on_cpu(table) else None


def _bucket(size: int, least: int = 1) -> int:
    """The next power of two.

    >>> _bucket(33), _bucket(32), _bucket(3, 16)
    (64, 32, 16)
    """
    return max(least, 1 << max(0, size - 1).bit_length())


def _split(model: Decoder, adapter: str | EllipsisType | None) -> tuple[Any, Any]:
    """The model's graph and arrays with that adapter in use; the model itself stays as it was."""
    if isinstance(adapter, EllipsisType):
        return nnx.split(model)
    return nnx.split(select(model, None if adapter is None else slot_of(model, adapter)))


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
