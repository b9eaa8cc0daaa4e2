"""Which folder a name stands for, and which of its files are the model: as transformers chooses them."""

import hashlib
import json
import re
import shlex
import struct
from pathlib import Path

from specjax.errors import UserError, misspelt, nearest
from specjax.files import is_inside, is_there, read_object
from specjax.values import several, shown

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
_HUB = re.compile(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}", re.ASCII)  # org/name
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def resolve(path: str | Path, revision: str | None = None, *, weights: bool = True) -> Path:
    """The local folder of a path or hub name (downloaded to the hub's cache; without `weights`, all but these).

    A name of two parts is asked of the hub, unless its first part is a folder here: then it is a path.

    Raises:
      UserError: neither exists, the hub can't be reached, or the folder is an adapter's.
    """
    name = str(path)
    if str(path) and is_there(path) and Path(path).is_dir():
        return _without_adapter(Path(path))
    if not _HUB.fullmatch(name):
        raise UserError(f"model {name[:1000]!r}: no such folder, and not a hub name of the form org/name.")
    here = Path(name.partition("/")[0])
    if here.is_dir():
        near = nearest(name, [f"{here}/{one.name}" for one in here.iterdir() if one.is_dir()])
        raise UserError(
            f"model {name!r}: the folder {here} is here and has no such folder, so the hub is not asked for it.{near}"
        )
    near = misspelt(here.name, (one.name for one in Path().iterdir() if one.is_dir()))
    if meant := misspelt(name, (f"{near}/{one.name}" for one in Path(near).iterdir()) if near else ()):
        raise UserError(f"model {name!r}: no such folder; {meant} is here, so the hub is not asked: did you mean that?")
    return _without_adapter(_download(name, revision, weights))


def _download(name: str, revision: str | None, weights: bool) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    # Mistral's repositories hold the same weights a second time, as "consolidated", and gpt-oss' in "original".
    wanted = ["*.json", "*.model", "*.jinja", "*.txt", "README.md", *(["*.safetensors"] if weights else [])]
    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                name, revision=revision or None, allow_patterns=wanted, ignore_patterns=["consolidated*", "original/*"]
            )
        )
        if not weights or any(folder.glob("*.safetensors")):
            return folder
        pickled = huggingface_hub.file_exists(name, "pytorch_model.bin", revision=revision or None)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model {name!r}: no such folder, and the hub did not give it ({reason}).") from error
    if pickled or (folder / "pytorch_model.bin.index.json").is_file():
        raise _pickled(name, name.rpartition("/")[2] + "-safetensors", tokenizer=True)
    return folder


def _without_adapter(folder: Path) -> Path:
    """The folder, unless it is one for which transformers loads another model, and the folder's adapter onto that.

    Raises:
      UserError: it is.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        return folder
    base = read_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    way = f"give its base model {shown(base)} and the folder as an adapter" if base else "give the folder as an adapter"
    more = f", or take {ADAPTER_CONFIG} out of it to use its own weights" if (folder / WEIGHTS).is_file() else ""
    raise UserError(f"model {str(folder)!r} is the folder of an adapter ({ADAPTER_CONFIG}): {way}{more}.")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers loads, in the index's order of names.

    They are what `config.json` names as `transformers_weights`; else `model.safetensors`, also beside shards; else the
    shards of the index. Source: `_get_resolved_checkpoint_files` of transformers 5 (transformers/modeling_utils.py).

    Raises:
      UserError: there are none, the index names one that is absent, or `transformers_weights` no such file.
    """
    named = (
        read_object(folder / "config.json").get("transformers_weights") if (folder / "config.json").is_file() else ""
    )
    if named:
        return _named_files(folder, named)
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        return _shards(folder / INDEX)
    if any(folder.glob("pytorch_model*.bin")):
        here = str(folder.absolute())
        raise _pickled(here, here + "-safetensors", tokenizer=has_tokenizer(folder))
    raise UserError(f"{folder} has no {WEIGHTS} and no {INDEX}.")


def _named_files(folder: Path, named: object) -> list[Path]:
    # By its name alone: in the hub's cache every file is a link that leads out of its folder.
    file = folder / (named if isinstance(named, str) and is_inside(named) else "")
    if not file.is_file() or not file.name.endswith((".safetensors", ".safetensors.index.json")):
        raise UserError(
            f"{folder / 'config.json'}: transformers_weights is {shown(named)}, which is no safetensors file or "
            "index in the folder: restore the file, or take the key out."
        )
    return _shards(file) if file.suffix == ".json" else [file]


def _shards(index: Path) -> list[Path]:
    table = read_object(index).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise UserError(f"{index} is not a safetensors index (it has no weight_map of names): restore the file.")
    if outside := [name for name in table.values() if not is_inside(name)]:
        raise UserError(
            f"{index} names {shown(outside[0])}, which is no file of its folder, and none outside is read: restore the "
            "index."
        )
    files = [index.parent / name for name in sorted(set(table.values()))]
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise UserError(f"{index} names files that are not there: {several(absent)}.")
    return files


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a tokenizer's files are there."""
    return any((Path(folder) / file).is_file() for file in _TOKENIZER_FILES)


def _pickled(model: str, out: str, *, tokenizer: bool) -> UserError:
    code = "import transformers as t; "
    code += f"t.AutoModelForCausalLM.from_pretrained({model!r}, dtype='auto').save_pretrained({out!r})"
    if tokenizer:
        code += f"; t.AutoTokenizer.from_pretrained({model!r}).save_pretrained({out!r})"
    return UserError(
        f"{model} has only pickled weights (.bin), which can run code when opened: where you trust them, convert them "
        f"with `python -c {shlex.quote(code)}` (it needs torch) and give {out}."
    )


def digest(file: Path) -> str:
    """A hash of all of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:32]


def fingerprint(folder: str | Path) -> str:
    """A hash of a checkpoint's content: every file's header and up to 16 blocks of 4 KiB of every tensor.

    It reads a fraction of the bytes, so that a 70B base is checked in seconds, and still sees any training of it.
    """
    digest = hashlib.sha256()
    for file in weight_files(Path(folder)):
        with file.open("rb") as stream:
            size = struct.unpack("<Q", stream.read(8))[0]
            header = stream.read(size)
            digest.update(header)
            for name, entry in sorted(json.loads(header).items()):
                if name == "__metadata__":
                    continue
                start, end = entry["data_offsets"]
                for block in range(start, end, max(4096, (end - start) // 16)):
                    stream.seek(8 + size + block)
                    digest.update(stream.read(min(4096, end - block)))
    return digest.hexdigest()[:32]
