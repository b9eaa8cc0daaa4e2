"""A folder that `datasets` saved: its own files are looked at before the library follows them."""

from pathlib import Path
from typing import Any

from specjax.errors import UserError
from specjax.files import is_inside, read_object
from specjax.values import NAMES, OBJECT, TEXT, Kind, check, listed, optional, shown

_FILES = listed(
    Kind("an object", lambda v: isinstance(v, dict) and is_inside(v.get("filename"))), "a list of files of its folder"
)
_STATE = {
    **dict.fromkeys(("_data_files", "_indices_data_files"), optional(_FILES)),
    "_format_columns": optional(NAMES),
    "_format_kwargs": optional(OBJECT),
    **dict.fromkeys(("_format_type", "_fingerprint", "_split"), optional(TEXT)),
}
_SPLITS = {"splits": listed(Kind("a name", is_inside), "a list of names of its own folders")}


def load(path: Path) -> Any:
    """What `save_to_disk` wrote. What its files name is looked at first: the library goes wherever they lead.

    Raises:
      UserError: a file is no JSON, or names one outside of the folder; or the folder is not whole.
    """
    import datasets
    import pyarrow as pa

    folders = [path]
    if (top := path / "dataset_dict.json").exists():
        told = read_object(top)
        check(told, _SPLITS, str(top))
        folders = [path / name for name in told.get("splits", ())]
    for state in (folder / "state.json" for folder in folders):
        check(read_object(state), _STATE, str(state))
    try:
        return datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
        reason = shown(" ".join(f"{type(error).__name__}: {error}".split()))
        raise UserError(f"{path} is not a whole dataset of `save_to_disk` ({reason}): save it again.") from error
