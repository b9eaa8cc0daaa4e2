"""A folder's tokenizer, read and written."""

import copy
import shutil
import tempfile
from pathlib import Path
from typing import Any

import transformers

from specjax.errors import UserError
from specjax.files import read_object, write_json
from specjax.hf.folder import has_tokenizer
from specjax.values import OBJECT, POSITIVE, TEXT, Kind, check, either, listed, optional

_CONFIG, _FAST = "tokenizer_config.json", "tokenizer.json"
_LARGEST = 1 << 28  # bytes of a tokenizer.json
_TOKEN = optional(either(TEXT, Kind("an object with its content", lambda v: isinstance(v, dict) and _is_token(v))))
_NAMED = Kind(
    "an object", lambda v: isinstance(v, dict) and all(isinstance(v.get(k), str) for k in ("name", "template"))
)
# What tokenizer_config.json may say, of what is read of it.
_KINDS: dict[str, Kind] = {
    "chat_template": optional(either(TEXT, listed(_NAMED, "a list of objects, each with a name and a template"))),
    "tokenizer_class": optional(TEXT),
    "model_max_length": optional(POSITIVE),
    "added_tokens_decoder": optional(
        Kind(
            "an object, token ids with an object of its content each",
            lambda v: isinstance(v, dict) and all(key.isdecimal() and _is_token(one) for key, one in v.items()),
        )
    ),
    "extra_special_tokens": optional(either(OBJECT, listed(_TOKEN, "a list of tokens"))),
    "additional_special_tokens": optional(listed(_TOKEN, "a list of tokens")),
    **dict.fromkeys((f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")), _TOKEN),
}
_SPECIAL, _TEMPLATES, _ADDED = "special_tokens_map.json", "additional_chat_templates", "added_tokens"
# Beside those that a tokenizer's class names.
_FILES = (
    *("tokenizer.json", "tokenizer_config.json", _SPECIAL, "added_tokens.json", "chat_template.jinja"),
    *("tokenizer.model", "vocab.json", "merges.txt", "tekken.json"),
)
# Keys of tokenizer_config.json that may differ from the files that a tokenizer was loaded from, which then stay but for
# these.
_CHANGEABLE = {
    *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
    *("padding_side", "truncation_side", "model_max_length", "clean_up_tokenization_spaces"),
}


def _is_token(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("content"), str)


def load_tokenizer(folder: str | Path) -> Any:
    """The folder's tokenizer, or None where it has none. Code that a folder brings along is never run, nor asked about.

    Raises:
      UserError: its files do not load, or name a class that is code of the folder's own.
    """
    if not has_tokenizer(folder):
        return None
    held = Path(folder) / _CONFIG
    if held.is_file():
        check(read_object(held), _KINDS, str(held))
    try:
        # Not given, it asks on the terminal, and reads the answer from whatever is standard input.
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the library that reads tokenizer.json knows but this one class
        if any("auto_map" in read_object(file) for file in Path(folder).glob("*config.json")):
            raise UserError(
                f"{folder}: its tokenizer is code of its own (auto_map), which is not run here: give a folder whose "
                "tokenizer transformers knows, with a tokenizer.json."
            ) from error
        raise UserError(f"{folder}: its tokenizer does not load ({_reason(Path(folder), error)}).") from error


def _reason(folder: Path, error: Exception) -> str:
    """Why a tokenizer does not load, in words: which of its files is no JSON object, or what its library says."""
    held = [folder / name for name in (_CONFIG, _FAST, _SPECIAL, "added_tokens.json") if (folder / name).is_file()]
    for file in held:
        try:
            read_object(file, most=_LARGEST)
        except UserError as more:
            return str(more).rstrip(".")
    said = " ".join(str(error).split()) or type(error).__name__
    return f"{_FAST}: {said[:200]}" if folder / _FAST in held else said[:200]


def save_tokenizer(tokenizer: Any, out: Path, *, eos_token: str = "") -> None:
    """Writes a tokenizer into a folder: the files that it was loaded from, but for what has been changed since.

    What transformers 5 writes is not opened by 4; a folder that 4 wrote stays one that both open. Added tokens are
    written into its files.

    Args:
      tokenizer: of transformers; loaded from a folder that is still there, or made otherwise.
      out: the folder.
      eos_token: its eos token there; "": its own.
    """
    if eos_token and eos_token != tokenizer.eos_token:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.eos_token = eos_token
    source = Path(tokenizer.name_or_path or "")
    fresh = load_tokenizer(source) if tokenizer.name_or_path and has_tokenizer(source) else None
    changes = None if fresh is None else _changes(fresh, tokenizer)
    if fresh is None or changes is None or (_ADDED in changes and not (source / _FAST).is_file()):
        tokenizer.save_pretrained(out)
        return
    for name in (*_FILES, *fresh.vocab_files_names.values()):
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    if tokenizer.chat_template == fresh.chat_template:
        if (source / _TEMPLATES).is_dir():
            shutil.copytree(source / _TEMPLATES, out / _TEMPLATES)
    else:
        changes |= _set_template(out, tokenizer.chat_template)
    if added := changes.pop(_ADDED, None):
        _change(out / _FAST, {_ADDED: added})
        _list_added(out / _CONFIG, added)
    if changes:
        _change(out / "tokenizer_config.json", changes)
        old = read_object(out / _SPECIAL) if (out / _SPECIAL).is_file() else {}
        _change(out / _SPECIAL, {key: value for key, value in changes.items() if key in old})


def _change(path: Path, changes: dict[str, Any]) -> None:
    """Gives keys of a JSON file other values; None: takes them out."""
    if changes:
        held = (read_object(path) if path.is_file() else {}) | changes
        write_json(path, {key: value for key, value in held.items() if value is not None or key not in changes})


def _list_added(path: Path, added: list[dict[str, Any]]) -> None:
    """Lists added tokens in a `tokenizer_config.json` that lists them, as transformers 4 does."""
    held = read_object(path) if path.is_file() else {}
    if "added_tokens_decoder" in held:
        listed = {str(one["id"]): {key: value for key, value in one.items() if key != "id"} for one in added}
        _change(path, {"added_tokens_decoder": held["added_tokens_decoder"] | listed})


def _changes(fresh: Any, tokenizer: Any) -> dict[str, Any] | None:
    """The keys of `tokenizer_config.json` in which a tokenizer differs from a fresh one; None: it differs in more.

    Of `tokenizer.json` it is the key of the added tokens too. Chat templates are not looked at.
    """
    (was, was_files), (now, now_files) = _written(fresh), _written(tokenizer)
    added = {_ADDED: now_files.pop(_ADDED)} if was_files.pop(_ADDED, None) != now_files.get(_ADDED) else {}
    now_files.pop(_ADDED, None)
    changed = {key for key in was.keys() | now.keys() if was.get(key) != now.get(key)}
    several = tokenizer.chat_template != fresh.chat_template and isinstance(tokenizer.chat_template, dict)
    if was_files != now_files or not changed <= _CHANGEABLE or several:
        return None
    return added | {key: now.get(key) for key in changed}


def _written(tokenizer: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What transformers writes of a tokenizer: its config, and its other files without how it was last called."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        held = {path.name: path for path in Path(folder).iterdir() if not path.name.endswith("chat_template.jinja")}
        config = read_object(held.pop("tokenizer_config.json"))
        held.pop(_TEMPLATES, None)
        more: dict[str, Any] = {name: path.read_bytes() for name, path in held.items() if name != "tokenizer.json"}
        fast = read_object(held["tokenizer.json"]) if "tokenizer.json" in held else {}
    config.pop("chat_template", None)
    return config, more | {key: value for key, value in fast.items() if key not in ("padding", "truncation")}


def _set_template(out: Path, template: str | None) -> dict[str, Any]:
    """Writes a chat template where the folder has its own; returns what `tokenizer_config.json` has to say of it."""
    path, file = out / "tokenizer_config.json", out / "chat_template.jinja"
    config = read_object(path) if path.is_file() else {}
    if file.is_file() or "backend" in config:  # the dialect of 5, and of late releases of 4
        file.unlink(missing_ok=True)
        if template:
            file.write_text(template, encoding="utf-8")
        return {"chat_template": template} if "chat_template" in config else {}
    return {"chat_template": template}
