"""Rows from wherever they lie.

A source is opened first, which tells its files. Its rows are `(where, row)` pairs: `where` names the place in the
user's own terms (`data/train.jsonl:7`), so that every later complaint about a row can say where it is.
"""

import codecs
import contextlib
import csv
import functools
import io
import json
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from specjax.data import saved
from specjax.data.remote import brought, is_address
from specjax.errors import UserError, argument, misspelt, nearest
from specjax.files import is_there, read_bytes
from specjax.values import shown

Row = Mapping[str, Any]

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt", ".jsonl.gz", ".jsonl.zst")

SHIPPED = "specjax:"  # before the name of a small set that comes with specjax, beside this file
ROW = 1 << 30  # characters that a row, or bytes that a file which is read whole, may have
_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)  # of the hub's
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


class Opened(NamedTuple):
    """A source before its rows are read.

    Attributes:
      rows: each call reads them from the start, as `(where, row)`.
      files: where they come from; None: from memory.
      total: how many rows, where that is known.
      once: whether they can be read but once.
    """

    rows: Callable[[], Iterator[tuple[str, Row]]]
    files: Sequence[Path] | None = None
    total: int | None = None
    once: bool = False


def read(source: str | Path | Iterable[Row | str], split: str = "train") -> Iterator[tuple[str, Row]]:
    """Yields `(where, row)` from a source, see `opened`."""
    yield from opened(source, split).rows()


def opened(source: str | Path | Iterable[Row | str], split: str = "train") -> Opened:
    """A file, a folder, a hub name, or rows given as dicts or strings.

    `.jsonl .json .csv .parquet` hold one row per line, element or record; `.jsonl.gz` and `.jsonl.zst` are compressed.
    A `.txt` file is one document, whole: packing cuts it where it must, and a blank line inside a text is no end of a
    document. A folder is a `datasets` folder (`save_to_disk`), or holds files of these kinds; where some of its file
    names carry the split's name (`train.jsonl`, `train-00000.parquet`) only these are read. A file or folder of such
    files behind an address (`hf://`, `gs://`, `s3://`) is brought here first. `specjax:general_text` and
    `specjax:general_chats` come with specjax.

    Raises:
      UserError: no such file or hub name, an unknown suffix; while the rows are read, a broken file.
    """
    if not isinstance(source, str | Path):
        total = len(source) if isinstance(source, Sized) else None
        return Opened(lambda: _given(source), None, total, once=isinstance(source, Iterator))
    if is_address(str(source)):
        return _remote(str(source), split)
    if str(source).startswith(SHIPPED):
        return _files([_shipped(str(source).removeprefix(SHIPPED))])
    path = Path(source)
    if str(source) and is_there(path):
        if path.is_dir():
            return _folder(path, split)
        if path.is_file():
            return _files([path])
        raise UserError(f"{source} is neither a file nor a folder: data is read more than once, so no pipe will do.")
    if _kind(path) in SUFFIXES or len(str(source)) > 200 or not _NAME.fullmatch(str(source)):
        name = str(source) if len(str(source)) < 1000 else shown(str(source))
        raise UserError(f"no such data file or folder: {name}.")
    here = Path(str(source).partition("/")[0])
    if here.is_dir():  # and the source is none: it is a path, misspelt, and no name to ask the hub for
        near = nearest(str(source), [f"{here}/{one.name}" for one in here.iterdir()])
        raise UserError(f"no such data file or folder: {source}; the folder {here} is here.{near}")
    if meant := misspelt(here.name, (one.name for one in Path().iterdir())):
        raise UserError(
            f"no such data file or folder: {source}; {meant} is here, so the hub is not asked: did you mean that?"
        )
    return _hub(str(source), split)


def _given(source: Iterable[Row | str]) -> Iterator[tuple[str, Row]]:
    for number, row in enumerate(source, 1):
        yield f"row {number}", {"text": row} if isinstance(row, str) else _mapping(row, f"row {number}")


def _shipped(name: str) -> Path:
    here = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.jsonl"))}
    if name not in here:
        raise UserError(f"{SHIPPED}{name} does not come with specjax: {', '.join(SHIPPED + one for one in here)} do.")
    return here[name]


def _files(paths: Sequence[Path]) -> Opened:
    return Opened(lambda: (row for path in paths for row in _file(path)), paths)


def _folder(path: Path, split: str) -> Opened:
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        import datasets

        dataset = saved.load(path)
        if isinstance(dataset, datasets.DatasetDict):
            if split not in dataset:
                raise UserError(f"{path} has no split '{split}', only {', '.join(dataset)}: set {argument('split')}.")
            dataset = dataset[split]
        return _dataset(dataset.with_format(None), f"{path} row")
    return _files(_chosen(path, split, sorted(f for f in path.rglob("*") if f.is_file())))


def _chosen(folder: str | Path, split: str, found: Sequence[Path]) -> Sequence[Path]:
    """A folder's files of rows: those named after the split, where there are any."""
    files = [f for f in found if _kind(f) in SUFFIXES]
    if not files:
        raise UserError(
            f"{folder} holds no data: neither a `datasets` folder nor files ending in {' '.join(SUFFIXES)}."
        )
    return [f for f in files if re.search(rf"(^|[-_.]){re.escape(split)}([-_.]|$)", f.stem)] or files


def _kind(path: Path) -> str:
    """The suffix, of a compressed file with the one before it."""
    return "".join(path.suffixes[-2:]) if path.suffix in _COMPRESSIONS else path.suffix


def _remote(source: str, split: str) -> Opened:
    """Rows of files behind an address, by which errors and places call them."""
    files = brought(source, functools.partial(_chosen, source, split))

    def rows() -> Iterator[tuple[str, Row]]:
        for path, address in files:
            try:
                for where, row in _file(path):
                    yield where.replace(str(path), address, 1), row
            except UserError as error:
                raise UserError(str(error).replace(str(path), address)) from error

    return Opened(rows, [path for path, _ in files])


def _hub(name: str, split: str) -> Opened:
    import datasets

    try:
        with _offline_where_it_is():
            dataset = datasets.load_dataset(name, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"'{name}' is neither a file or folder here nor a dataset that the hub could give ({reason}); "
            "check the path, or the name and the network."
        ) from error
    return _dataset(dataset, f"{name}[{split}] row")


@contextlib.contextmanager
def _offline_where_it_is() -> Iterator[None]:
    """Has `datasets` look into its cache at once where the hub's name is not known: it would ask half a minute.

    A proxy would know the name for us.
    """
    import datasets.config

    before, host = datasets.config.HF_HUB_OFFLINE, urllib.parse.urlsplit(datasets.config.HF_ENDPOINT).hostname
    if not before and not urllib.request.getproxies():
        try:
            socket.getaddrinfo(host, 443)
        except OSError:
            datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _dataset(dataset: Any, prefix: str) -> Opened:
    """Rows of a `datasets.Dataset`, which lie in Arrow files, or in memory where it names none."""
    files = [Path(file["filename"]) for file in dataset.cache_files]
    return Opened(lambda: _numbered(dataset, prefix), files or None, len(dataset))


def _file(path: Path) -> Iterator[tuple[str, Row]]:
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet, ".txt": _txt}
    readers |= {f".jsonl{suffix}": _jsonl for suffix in _COMPRESSIONS}
    reader = readers.get(_kind(path))
    if reader is None:
        raise UserError(f"{path} is of no known kind: use one of {' '.join(SUFFIXES)}.")
    try:
        yield from reader(path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason}{_undecodable(path)}.") from error


def _undecodable(path: Path) -> str:
    """Where a file is no UTF-8, in words: what is raised counts from the last piece that was read."""
    if path.suffix in _COMPRESSIONS:
        return ""
    decoder, done, line = codecs.getincrementaldecoder("utf-8")(), 0, 1
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(piece)
            except UnicodeDecodeError as error:
                line += piece[: max(0, error.start - pending)].count(b"\n")
                return f" at byte {done - pending + error.start}, in line {line}"
            done, line = done + len(piece), line + piece.count(b"\n")
    return f" at byte {done - len(decoder.getstate()[0])}, in line {line}"


@contextlib.contextmanager
def _lines(path: Path) -> Iterator[TextIO]:
    """A file of text, also a compressed one."""
    if path.suffix not in _COMPRESSIONS:
        with path.open(encoding="utf-8-sig") as lines:
            yield lines
        return
    import pyarrow as pa

    try:
        with pa.input_stream(str(path), compression=_COMPRESSIONS[path.suffix]) as stream:
            yield io.TextIOWrapper(stream, encoding="utf-8-sig")
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a whole {_COMPRESSIONS[path.suffix]} file: {error}.") from error


def _jsonl(path: Path) -> Iterator[tuple[str, Row]]:
    with _lines(path) as lines:
        for number, line in enumerate(iter(lambda: lines.readline(ROW + 1), ""), 1):
            where = f"{path}:{number}"
            if len(line) > ROW:
                raise UserError(f"{where} is longer than {ROW:,} characters, the most that a row may have: split it.")
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(f"{where} is not JSON: {error.msg} at column {error.colno}.") from error
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{where} is not JSON that can be read: {_too_much(error)}.") from error
                yield where, _mapping(row, where)


def _json(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        rows = json.loads(_whole(path))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # several values: JSON lines under the name .json, as the hub often has it
            yield from _jsonl(path)
            return
        raise UserError(f"{path}:{error.lineno} is not JSON: {error.msg} at column {error.colno}.") from error
    except UnicodeDecodeError:
        raise  # told where all files are read
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON that can be read: {_too_much(error)}.") from error
    if isinstance(rows, dict):
        lists = [value for value in rows.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        rows = lists[0] if len(lists) == 1 else [rows]
    if not isinstance(rows, list):
        raise UserError(f"{path} holds a JSON {type(rows).__name__}: give a list of objects.")
    yield from _numbered(rows, f"{path} row")


def _too_much(error: ValueError | RecursionError) -> str:
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)


def _csv(path: Path) -> Iterator[tuple[str, Row]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        start = 2
        while (row := _long_row(path, reader)) is not None:
            where, start = f"{path}:{start}", reader.line_num + 1
            if None in row or None in row.values():
                raise UserError(f"{where} does not have the {len(reader.fieldnames or ())} fields of the header line.")
            yield where, row


def _long_row(path: Path, reader: "csv.DictReader[str]") -> dict[str | Any, str | Any] | None:
    """The next row, or None: its fields may be as long as documents are, where the module's default is 128 KiB."""
    before = csv.field_size_limit(ROW)
    try:
        return next(reader, None)
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num + 1} is not CSV that can be read: {error}.") from error
    finally:
        csv.field_size_limit(before)


def _parquet(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        batches = pa.parquet.ParquetFile(path).iter_batches(batch_size=1000)
        yield from _numbered((row for batch in batches for row in batch.to_pylist()), f"{path} row")
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a whole Parquet file: {error}.") from error


def _txt(path: Path) -> Iterator[tuple[str, Row]]:
    yield str(path), {"text": io.StringIO(_whole(path), newline=None).read()}


def _whole(path: Path) -> str:
    """The text of a file that is read at once."""
    return read_bytes(path, ROW).decode("utf-8-sig")


def _numbered(rows: Iterable[Any], prefix: str) -> Iterator[tuple[str, Row]]:
    for number, row in enumerate(rows, 1):
        where = f"{prefix} {number}"
        yield where, _mapping(row, where)


def _mapping(row: Any, where: str) -> Row:
    if isinstance(row, Mapping):
        return row
    raise UserError(f"{where} is a JSON {type(row).__name__}: a row is an object with named columns.")
