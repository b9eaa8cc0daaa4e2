"""Which characters of a rendered conversation are the assistant's, and where one conversation must become several rows.

A chat template is a program, so its author or the program itself is asked, and no string is ever searched for:

1. Where the template marks them, `{% generation %} ... {% endgeneration %}`, the marks decide (as TRL's
   `assistant_only_loss`). One thing is added: where a mark stops just before the special token that ends the turn,
   that token trains too, for a model that never learns to end its turn never stops.
2. Else the conversation is rendered up to each assistant turn, with the generation prompt, and up to its end. Where
   both are prefixes of the whole rendering, what lies between is the assistant's: its words and its end-of-turn token,
   with the line break after it where the template writes one (as TRL's own training templates mark it).
3. A template may write a turn otherwise once another follows: Qwen3 leaves the reasoning of earlier turns out, gpt-oss
   ends them with another token. What the model is given, and is to answer, is then no part of the whole. Such a
   conversation becomes a row for each answer, which ends with it: the prompt as inference has it, and the turn as it is
   when it is the last (`exact`). A generation prompt may also go on where the turn has nothing (Gemma 4's,
   DeepSeek-R1's): the turn's words then follow the prompt.
4. On request the conversation stays whole all the same. Then a turn's words are replaced by a placeholder, which tells
   what stands before and after them, here and where the conversation ends with this turn. The turn is found where what
   precedes it is the prompt that the model would be given for it, and what follows its words begins with what ends the
   turn when it is the last.

Where none of this holds, the row is refused: to guess would be silently wrong. And so is a row of which the template
leaves something out (`specjax.data.held`).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from specjax.data import held, stops
from specjax.data.example import Conversation
from specjax.data.template import END, WORDS, Made, Span, Template, Wanted, ahead
from specjax.errors import UserError

_AHEAD = 8  # answers of a conversation whose beginnings are rendered together with others': all of them are in memory
_MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def all_rows(
    tokenizer: Any, template: str, chats: Sequence[Conversation], *, exact: bool = True
) -> list[list[tuple[str, list[Span]]]]:
    """`rows` of each of some conversations, most of what they ask of the template asked at once."""
    marked = _MARKS.search(template) is not None
    asked = []
    for chat in chats:
        count, answers = len(chat.messages), chat.answers()[:_AHEAD]
        wanted = [Wanted(count, marks=marked)]
        if not marked or (exact and len(answers) > 1):
            wanted += [Wanted(turn + 1) for turn in answers if turn + 1 < count]
        wanted += [Wanted(turn, prompt=True) for turn in answers if turn]
        asked.append((chat, wanted))
    ready = ahead(template, tokenizer.special_tokens_map, asked)
    return [rows(tokenizer, template, chat, exact=exact, ready=one) for chat, one in zip(chats, ready, strict=True)]


def rows(
    tokenizer: Any,
    template: str,
    chat: Conversation,
    *,
    exact: bool = True,
    ready: Mapping[Wanted, Made] | None = None,
) -> list[tuple[str, list[Span]]]:
    """The conversation as rows: one, or one for each answer where the template rewrites what others follow.

    Args:
      tokenizer: its special tokens are what the template knows of it.
      template: the text of a Jinja chat template.
      chat: the conversation; which of its turns train, it says itself.
      exact: whether each answer must follow what inference gives the model for it; False: one row in any case.
      ready: see `Template`.

    Returns:
      Each row's text, and the [start, end) characters of it that train.

    Raises:
      UserError: the template refuses the conversation, leaves something of it out, or does not tell which characters
        are the assistant's.
    """
    import jinja2

    run = Template(template, chat, tokenizer.special_tokens_map, ready)
    answers = chat.answers()
    try:
        text, found = _spans(tokenizer, run, answers, exact)
        if found is not None:
            held.check(run, answers if exact else answers[-1:], text)
            return [(text, found)]
        made = []
        for turn in answers:
            branch = run.upto(turn)
            text, found = _branch(tokenizer, branch)
            held.check(branch, [turn], text, elsewhere=answers)
            made.append((text, found))
        return made
    except jinja2.TemplateError as error:
        raise UserError(f"{chat.where}: the chat template refuses the conversation: {error}.") from error


def spans(tokenizer: Any, template: str, chat: Conversation) -> tuple[str, list[Span]]:
    """The conversation as one row; arguments, result and errors as those of `rows`."""
    return rows(tokenizer, template, chat, exact=False)[0]


def check_stop(tokenizer: Any, template: str) -> None:
    """Raises `UserError` where the token that ends an answer would not train, because the template writes it later."""
    words = (("user", "question"), ("assistant", "answer"), ("user", "question"))
    chat = Conversation("the chat template", [{"role": role, "content": text} for role, text in words])
    try:
        whole, found = spans(tokenizer, template, chat)
    except UserError:
        return  # it wants other conversations: what its rows have is seen there
    if found:
        stops.check(tokenizer, whole, found[-1], chat.where)


def render(tokenizer: Any, template: str, chats: Sequence[Conversation], *, prompt: bool = False) -> list[str]:
    """The conversations as texts, with the generation prompt behind each where `prompt` is true.

    Raises:
      UserError: the template refuses a conversation, or leaves something of it out.
    """
    names = tokenizer.special_tokens_map
    ready = ahead(template, names, [(chat, [Wanted(len(chat.messages), prompt)]) for chat in chats])
    return [_render(Template(template, chat, names, one), prompt) for chat, one in zip(chats, ready, strict=True)]


def _render(run: Template, prompt: bool) -> str:
    import jinja2

    chat = run.chat
    try:
        text = run.render(len(chat.messages), prompt=prompt)
        held.check(run, chat.answers()[-1:], text)
        return text
    except jinja2.TemplateError as error:
        raise UserError(f"{chat.where}: the chat template refuses the conversation: {error}.") from error


def _spans(tokenizer: Any, run: Template, answers: Sequence[int], exact: bool) -> tuple[str, list[Span] | None]:
    """The whole conversation and what trains of it; None where that would not be `exact`."""
    if not _MARKS.search(run.text):
        whole = run.render(len(run.chat.messages))
        found = []
        for turn in answers:
            span, true = _turn(run, whole, turn)
            if exact and not true:
                return whole, None
            found.append(span or _refuse(run.chat, turn))
        return whole, found
    whole, marks = run.marked(len(run.chat.messages))
    if exact and any(
        not _is_true(tokenizer, run, whole, turn) for turn in answers if turn + 1 < len(run.chat.messages)
    ):
        return whole, None
    told = [(turn, span) for turn in answers if (span := _told(run, whole, turn))]
    return whole, stops.ended(tokenizer, run.chat.where, whole, _chosen(run, whole, marks, answers), told)


def _branch(tokenizer: Any, run: Template) -> tuple[str, list[Span]]:
    """A conversation that ends with the answer which trains: the prompt as inference has it, and the answer."""
    turn = len(run.chat.messages) - 1
    marked = _MARKS.search(run.text)
    whole, marks = run.marked(turn + 1) if marked else (run.render(turn + 1), [])
    prompt = _prompt(run, turn)
    if prompt is None:
        _refuse(run.chat, turn)
    seam = len(prompt)
    if not whole.startswith(prompt):
        whole, seam = _seam(run, whole, prompt)
        shift = len(prompt) - seam
        whole, marks = prompt + whole[seam:], [(start + shift, end + shift) for start, end in marks if end > seam]
    if not marked:
        return whole, [(len(prompt), len(whole))] if len(prompt) < len(whole) else []
    marks = [(max(start, len(prompt)), end) for start, end in marks if end > len(prompt)]
    return whole, stops.ended(tokenizer, run.chat.where, whole, marks, [(turn, (len(prompt), len(whole)))])


def _seam(run: Template, whole: str, prompt: str) -> tuple[str, int]:
    """The conversation, and where its last turn goes on behind a prompt with which it does not begin."""
    turn = len(run.chat.messages) - 1
    words = run.chat.messages[turn]["content"]
    before, *after = run.render(turn + 1, placeholder=turn).split(WORDS)
    if len(after) == 1 and whole.startswith(before):
        raw = before + words + after[0]
        if raw.startswith(prompt) and words.strip() not in whole:
            return raw, len(prompt)  # the prompt begins the reasoning, which the template drops (DeepSeek-R1's)
        if prompt.startswith(before):
            return whole, len(before)  # the prompt goes on where the turn has nothing (Gemma 4's)
        # What is written of earlier turns may hang upon this one (gpt-oss drops what was thought before a final
        # answer): the turn begins with what the generation prompt adds, behind the message before it.
        asked = prompt.removeprefix(run.render(turn))
        at = before.rfind(asked) + len(asked)
        last = run.chat.messages[turn - 1]["content"].strip() if turn else ""
        if asked not in ("", prompt) and asked in before and last and last not in before[at:]:
            return whole, at
    raise UserError(
        f"{run.chat.where}: the prompt that the chat template gives for message {turn + 1} is not what it writes "
        "before that message, so the assistant's tokens cannot be told: where it has an option for reasoning, "
        "enable_thinking say, set it in the row's chat_template_kwargs, or use another template."
    )


def _is_true(tokenizer: Any, run: Template, whole: str, turn: int) -> bool:
    """Whether the whole has message `turn` of a marked template as it is where the conversation ends with it."""
    import jinja2

    try:
        upto = run.render(turn + 1)
        if whole.startswith(upto):
            return True
        upto, marks = run.marked(turn + 1)
    except jinja2.TemplateError:
        return True  # it wants no beginning of the conversation: its marks then say it all
    said = upto[: max((end for _, end in marks), default=0)]
    # The end-of-text token may close the conversation behind the token that ends the turn (Phi-3).
    closed = said.removesuffix(run.names.get("eos_token") or "")
    ids, _ = stops.tokens_of(tokenizer, closed.rstrip()[-64:])
    return whole.startswith(said) or (whole.startswith(closed) and bool(ids) and stops.is_special(tokenizer, ids[-1]))


def _refuse(chat: Conversation, turn: int) -> NoReturn:
    if turn == 0:
        raise UserError(
            f"{chat.where}: the conversation begins with the assistant, and the chat template renders no prompt before "
            "any message, so the assistant's tokens cannot be told; let a user or a system message come first."
        )
    raise UserError(
        f"{chat.where}: the chat template renders the conversation up to message {turn + 1} otherwise than the whole "
        "has it, so the assistant's tokens cannot be told; keep one answer per row, or use a template that does not "
        "rewrite earlier turns."
    )


def _prompt(run: Template, turn: int) -> str | None:
    """What the model is given before it writes message `turn`; None where a template wants a message first."""
    import jinja2

    try:
        return run.render(turn, prompt=True)
    except jinja2.TemplateError:
        if turn:
            raise
        return None


def _turn(run: Template, whole: str, turn: int) -> tuple[Span | None, bool]:
    """The characters of message `turn`, an assistant's, or None where the template does not tell.

    And whether they, and what precedes them, are what they are where the conversation ends with this turn.
    """
    prompt = _prompt(run, turn)
    if prompt is None:
        return None, False
    upto = whole if turn + 1 == len(run.chat.messages) else run.render(turn + 1)
    if whole.startswith(upto) and upto.startswith(prompt):
        return (len(prompt), len(upto)), True
    found = _rewritten(run, whole, turn, prompt)
    true = found and whole.startswith(prompt) and upto.startswith(whole[: found[1]])
    return found, bool(true)


def _rewritten(run: Template, whole: str, turn: int, prompt: str) -> Span | None:
    """`_turn`, where what follows a turn changes how it is written."""
    if not isinstance(run.chat.messages[turn].get("content"), str):
        return None
    end = str(run.names.get("eos_token") or "")
    hidden = END * len(end)  # as long as what it stands for, so that places are the same

    def shown(text: str) -> str:
        return text.replace(hidden, end) if end else text

    parts = run.render(len(run.chat.messages), placeholder=turn, end=hidden).split(WORDS)
    last = run.render(turn + 1, placeholder=turn, end=hidden).split(WORDS)
    masked = run.render(len(run.chat.messages), end=hidden)
    if not len(parts) == len(last) == 2 or shown(masked) != whole:
        return None
    (before, after), closing = parts, last[1]
    if not (masked.startswith(before) and masked.endswith(after)):
        return None
    if not after.startswith(closing):
        closing = closing.removesuffix(hidden)  # the end-of-text token closes a conversation, not every turn (Phi-3)
    if not after.startswith(closing) or not (whole.startswith(prompt) or prompt.startswith(shown(before))):
        return None
    start = len(prompt) if whole.startswith(prompt) else len(before)
    stop = len(whole) - len(after) + len(closing)
    return (start, stop) if start < stop else None


def _chosen(run: Template, whole: str, marks: list[Span], answers: Sequence[int]) -> list[Span]:
    """The marks of the turns that train: not those of silent ones, and none before the first, which is a prompt."""
    if not answers:
        return []
    said = [i for i, message in enumerate(run.chat.messages) if message["role"] == "assistant"]
    for turn in said:
        if turn > answers[0] and turn not in answers:
            start, end = _told(run, whole, turn) or _refuse(run.chat, turn)
            marks = [mark for mark in marks if not start <= mark[0] < end]
    if said[0] == answers[0]:
        return marks
    prompt = _prompt(run, answers[0])
    if prompt is None or not whole.startswith(prompt):
        _refuse(run.chat, answers[0])
    return [(max(start, len(prompt)), end) for start, end in marks if end > len(prompt)]


def _told(run: Template, whole: str, turn: int) -> Span | None:
    """`_turn`, or None also where the template wants no beginning of the conversation: its marks then say it all."""
    import jinja2

    try:
        return _turn(run, whole, turn)[0]
    except jinja2.TemplateError:
        return None
