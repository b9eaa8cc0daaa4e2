"""Text from a model: batched prompts of unequal length, a KV cache, greedy or sampled.

Prompts are padded on the left, so that all rows of a batch write the same cache slot. One compiled program reads the
prompts but for their last tokens in one pass; then each turn of a `jax.lax.while_loop` takes every row's last token
and makes the next, until all have ended. Sizes are rounded up to powers of two, and what may differ within them (the
true limit, temperature, filters, seed, end tokens) is an argument: a bucket compiles once.

B batch, P prompt length without the last token, N new tokens, P + N cache length, V vocab, E tokens that end a text.
"""

import functools
import math
from collections.abc import Sequence
from contextlib import nullcontext
from types import EllipsisType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from specjax import sharding
from specjax.data.chat import BUILT_IN, resolve, spans
from specjax.data.formats import Conversation
from specjax.errors import UserError
from specjax.lora import adapters
from specjax.models import Decoder


def generate(
    model: Decoder,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Sequence[str] = (),
    chat: bool = False,
    system: str | None = None,
    adapter: str | EllipsisType | None = ...,
    batch_size: int = 16,
) -> list[str]:
    """What the model writes after each prompt, up to a token of `end_tokens`, a stop string, or its limit.

    Args:
      model: the model.
      tokenizer: its tokenizer.
      prompts: the texts to continue as they are; with `chat`, what the user says.
      max_new_tokens: the limit.
      temperature: 0 takes the likeliest token; otherwise the logits are divided by it and a token is drawn.
      top_k: draw from this many of the likeliest tokens; 0: from all.
      top_p: draw from the fewest of the likeliest tokens whose probabilities sum to this; 1: from all.
      seed: of the draws; prompt i draws the same in whatever batch it is.
      stop: strings that end a text and are cut off. A special token among them ends the computation as well; the
        others are looked for in the finished text.
      chat: render each prompt as a user's turn through the tokenizer's chat template.
      system: the system turn before it.
      adapter: the LoRA adapter to answer with, None for the base alone; default the one in use.
      batch_size: prompts at a time.

    Raises:
      UserError: a prompt that is empty or too long, no chat template, an option out of range, no such adapter.
    """
    if tokenizer is None:
        raise UserError("the model has no tokenizer: give one, or use generate_tokens with token ids.")
    if isinstance(prompts, str):
        raise UserError("prompts is one string where a list of strings is wanted: write [prompt].")
    if system is not None and not chat:
        raise UserError("a system text needs a chat to stand in: give chat=True with it, or leave it out.")
    if isinstance(stop, str) or "" in stop:
        raise UserError(f"stop is {stop!r}: it must be a list of strings, none of them empty.")
    if not prompts:
        return []
    rows = _render(tokenizer, prompts, system) if chat else _plain(tokenizer, prompts)
    special = tokenizer.get_added_vocab()
    found = generate_tokens(
        model,
        rows,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        eos_ids=[*end_tokens(model, tokenizer, chat=chat), *(special[text] for text in stop if text in special)],
        adapter=adapter,
        batch_size=batch_size,
    )
    # Some tokenizers drop a text's first space: a continuation is what it adds to its prompt, an answer stands alone.
    heads = [[] if chat else row for row in rows]
    return [_cut(_decode(tokenizer, head, new), stop) for head, new in zip(heads, found, strict=True)]


def generate_tokens(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_ids: Sequence[int] = (),
    adapter: str | EllipsisType | None = ...,
    batch_size: int = 16,
) -> list[list[int]]:
    """The ids that follow each prompt's ids, up to the first of `eos_ids`, which is left out; the rest as `generate`.

    On a mesh, the rows of a batch are split over `data` and `fsdp`; empty rows fill it up where they do not divide it.
    """
    _check_options(max_new_tokens, temperature, top_k, top_p, batch_size)
    _check_prompts(prompts, max_new_tokens, model.config.max_positions, model.config.vocab_size)
    graph, state = _split(model, adapter)
    mesh = sharding.mesh_of(model.norm.scale[...])
    ways = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in sharding.RULES["batch"])
    size = ways * _bucket(math.ceil(min(batch_size, len(prompts)) / ways))
    stop = np.full(_bucket(len(eos_ids), 8), -1, np.int32)  # -1 is no token
    stop[: len(eos_ids)] = eos_ids
    settings = _Settings(stop, max_new_tokens, np.uint32(seed % 2**32), float(temperature), top_k, float(top_p))
    static = {"graph": graph, "new": _bucket(max_new_tokens, 16), "greedy": temperature == 0}
    found: list[list[int]] = [[] for _ in prompts]
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(prompts), size):
        chosen = by_length[start : start + size]
        tokens = np.zeros((size, _bucket(len(prompts[chosen[-1]]) - 1, 32) + 1), np.int32)
        rows = _Rows(tokens, np.zeros(size, np.int32), np.zeros(size, np.int32))
        for row, i in enumerate(chosen):
            tokens[row, -len(prompts[i]) :], rows.lengths[row], rows.indices[row] = prompts[i], len(prompts[i]), i
        with nullcontext() if mesh is None else jax.set_mesh(mesh):
            out = _program(state, rows, settings, **static)
        for i, row in zip(chosen, np.asarray(out), strict=False):
            found[i] = row[row >= 0].tolist()
    return found


def end_tokens(model: Decoder, tokenizer: Any, *, chat: bool = False) -> list[int]:
    """The ids of the tokens that end a text.

    They are the `eos_token_id` (a number or a list) of `generation_config.json`, or else of `config.json`, as in
    transformers; the tokenizer's eos token; and in a chat the first special token that the template writes after an
    assistant's words, which need not be that (Llama 3's `<|eot_id|>`; `<|im_end|>` of a model taught ChatML). Where the
    template does not tell (it renders an answer otherwise than the prompt for one), the others serve.
    """
    ids = model.config.generation.get("eos_token_id")
    ids = model.config.hf.get("eos_token_id") if ids is None else ids
    found = [*(ids if isinstance(ids, (list, tuple)) else [ids]), tokenizer.eos_token_id]
    if chat:
        found.append(_end_of_turn(tokenizer))
    return sorted({int(token) for token in found if token is not None})


class _Rows(NamedTuple):
    """A batch of prompts."""

    tokens: Any  # int32 [B,P+1], padded on the left
    lengths: Any  # int32 [B], 0 for a row that fills the batch up
    indices: Any  # int32 [B], each row's stream of random numbers


class _Settings(NamedTuple):
    """What may change without compiling again: scalars, but for the tokens that end a row, int32 [E]."""

    stop: Any
    limit: Any
    seed: Any
    temperature: Any
    top_k: Any
    top_p: Any


@functools.partial(jax.jit, static_argnames=("graph", "new", "greedy"))
def _program(state: Any, rows: _Rows, settings: _Settings, *, graph: Any, new: int, greedy: bool) -> Array:
    """The new tokens of each row, int32 [B,N] with -1 after its end; N is `new`, `graph` and `state` are the model."""
    model = nnx.merge(graph, state)
    batch, last = rows.tokens.shape[0], rows.tokens.shape[1] - 1
    stop, limit, seed, *how = settings
    # The position of the token that a slot holds or will hold; negative: padding. A slot not yet written is later than
    # every query, so the causal mask hides it.
    positions = jnp.arange(last + new, dtype=jnp.int32)[None] - (last + 1 - rows.lengths)[:, None]
    segments = (positions >= 0).astype(jnp.int32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), rows.indices)

    def extend(tokens: Array, cache: Any, slot: Array | int) -> tuple[Array, Any]:
        where = jax.lax.dynamic_slice_in_dim(positions, slot, tokens.shape[1], axis=1)
        return model.extend(tokens, where, cache, positions, segments, slot)

    def unfinished(carry: Any) -> Array:
        step, _, done, _, _ = carry
        return (step < limit) & ~done.all()

    def turn(carry: Any) -> Any:
        step, token, done, out, cache = carry
        hidden, cache = extend(token[:, None], cache, last + step)
        logits = model.unembed(hidden[:, 0])
        if greedy:
            token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        else:
            token = sample(logits, jax.vmap(jax.random.fold_in, (0, None))(keys, step), *how)
        done |= (token[:, None] == stop[None]).any(axis=1)
        return step + 1, token, done, out.at[:, step].set(jnp.where(done, -1, token)), cache

    axes = ("layers", "batch", "length", "kv_heads", "head_dim")
    cache = jax.tree.map(lambda x: sharding.constrain(x, *axes), model.empty_cache(batch, last + new))
    _, cache = extend(rows.tokens[:, :last], cache, 0)
    start = (jnp.int32(0), rows.tokens[:, last], rows.lengths == 0, jnp.full((batch, new), -1, jnp.int32), cache)
    out = jax.lax.while_loop(unfinished, turn, start)[3]
    return sharding.constrain(out, None, None)  # on every device: each process reads all rows


def sample(logits: Array, keys: Array, temperature: Any, top_k: Any, top_p: Any) -> Array:
    """Draws a token a row: temperature, then top-k, then top-p over what is left, as transformers' warpers.

    Args:
      logits: float32 [B,V].
      keys: random keys [B].
      temperature: above 0.
      top_k: 0: off. Tokens that tie with the last one kept are kept, here and in top-p.
      top_p: of the least likely tokens, those that together have at most 1 - top_p go (arXiv:1904.09751); 1: off.

    Returns:
      int32 [B].
    """
    vocab = logits.shape[-1]
    scores = logits / temperature

    def floor() -> Array:
        ascending = jnp.sort(scores, axis=-1)
        count = jnp.where(top_k > 0, jnp.minimum(top_k, vocab), vocab)
        least = jnp.take(ascending, vocab - count, axis=-1)[:, None]
        mass = jnp.cumsum(jax.nn.softmax(jnp.where(ascending < least, -jnp.inf, ascending), axis=-1), axis=-1)
        kept = (mass > 1 - top_p).at[:, -1].set(True)
        return jnp.min(jnp.where(kept, ascending, jnp.inf), axis=-1, keepdims=True)

    no_floor = jnp.full_like(scores[:, :1], -jnp.inf)
    lowest = jax.lax.cond((top_k > 0) | (top_p < 1), floor, lambda: no_floor)  # without filters nothing is sorted
    return jax.vmap(jax.random.categorical)(keys, jnp.where(scores < lowest, -jnp.inf, scores)).astype(jnp.int32)


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
    before = adapters.active(model)
    adapters.use(model, adapter)
    try:
        return nnx.split(model)
    finally:
        adapters.use(model, before)


def _check_options(max_new_tokens: int, temperature: float, top_k: int, top_p: float, batch_size: int) -> None:
    for name, value, fits, wanted in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
        ("temperature", temperature, 0 <= temperature < math.inf, "0 (greedy) or more"),
        ("top_k", top_k, top_k >= 0, "0 (off) or more"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1 (off)"),
        ("batch_size", batch_size, batch_size >= 1, "at least 1"),
    ):
        if not fits:
            raise UserError(f"{name} is {value}: it must be {wanted}.")


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


def _plain(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """The prompts' ids with one begin-of-text token where the tokenizer adds one, and no end-of-text token."""
    bos = tokenizer.bos_token_id
    adds_eos = tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id
    rows = tokenizer(list(prompts), return_attention_mask=False, verbose=False)["input_ids"]
    # A text that itself began with the begin-of-text token has it twice.
    return [row[int(row[:2] == [bos, bos]) : len(row) - adds_eos] for row in rows]


def _render(tokenizer: Any, prompts: Sequence[str], system: str | None) -> list[list[int]]:
    """The ids of each prompt as a user's turn, ready for the answer; the template alone writes special tokens."""
    import jinja2

    if not tokenizer.chat_template:
        raise UserError(
            "the tokenizer has no chat template: continue plain text (chat=False; --raw on the command line), or train "
            f"with one (config.data.template; built in are {', '.join(BUILT_IN)})."
        )
    before = [] if system is None else [{"role": "system", "content": system}]
    chats = [[*before, {"role": "user", "content": prompt}] for prompt in prompts]
    try:
        texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    except jinja2.TemplateError as error:
        raise UserError(f"the tokenizer's chat template refuses the prompt: {error}.") from error
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _end_of_turn(tokenizer: Any) -> int | None:
    """The first special token that the chat template writes after an assistant's words, if there is one to be told."""
    answer = "answer"
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
    try:
        whole, [(start, end)] = spans(tokenizer, resolve(tokenizer), Conversation("the chat template", turns))
    except UserError:
        return None
    after = whole[start:end].rpartition(answer)[2]
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    return next((token for token in ids if token in tokenizer.added_tokens_decoder), None)


def _decode(tokenizer: Any, head: Sequence[int], new: Sequence[int]) -> str:
    """The text that `new` adds to `head`, without special tokens, its spaces as the model wrote them."""
    decode = functools.partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    before, whole = decode(head), decode([*head, *new])
    return whole[len(before) :] if whole.startswith(before) else decode(new)


def _cut(text: str, stop: Sequence[str]) -> str:
    """The text up to the first stop string.

    >>> _cut("one. two; three", (";", "."))
    'one'
    """
    return text[: min((at for at in map(text.find, stop) if at >= 0), default=len(text))]
