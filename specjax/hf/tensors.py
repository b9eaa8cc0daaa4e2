"""safetensors files by range: every tensor as a memory-mapped array, nothing read before it is touched.

Format: https://github.com/huggingface/safetensors#format (8 bytes with the header's size, a JSON header, the data).
"""

import json
import mmap
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from specjax.errors import UserError
from specjax.hf import mxfp4
from specjax.values import shown

# What weights are stored in; anything else is a quantised checkpoint.
DTYPES: dict[str, Any] = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32, "F64": np.float64}


class Tensors(dict[str, Any]):
    """Every tensor of some files by name: read-only, C-contiguous, memory-mapped, of the file's dtype.

    Where two tensors are one in MXFP4 (gpt-oss), that one is there, a `mxfp4.Packed`.
    """

    def __init__(self, files: list[Path]):
        """Maps the files.

        Raises:
          UserError: a file is corrupt or cut short, or holds tensors of a dtype that is not in `DTYPES`, or one that
            another file holds too; it is named.
        """
        super().__init__()
        self._maps = [self._map(file) for file in files]
        mxfp4.join(self, str(files[0].parent))

    def _map(self, file: Path) -> mmap.mmap:
        try:
            with safe_open(file, framework="np"):  # it checks the header against the file's size
                pass
        except (SafetensorError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{file} is corrupt or cut short ({reason}): copy or download it again.") from error
        with file.open("rb") as stream:
            size = struct.unpack("<Q", stream.read(8))[0]
            header = json.loads(stream.read(size))
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if name in self:
                raise UserError(
                    f"{file}: tensor {shown(name)} is in another of the model's files too, and which one counts is not "
                    "said: copy or download them again."
                )
            packed = entry["dtype"] == "U8" and name.endswith((mxfp4.BLOCKS, mxfp4.SCALES))
            if entry["dtype"] not in DTYPES and not packed:
                raise UserError(
                    f"{file}: tensor {name} is stored as {entry['dtype']}, and only {', '.join(DTYPES)} are read: give "
                    "the checkpoint that it was quantised from."
                )
            begin, end = entry["data_offsets"]
            data = np.frombuffer(mapped, np.uint8, end - begin, 8 + size + begin)
            self[name] = data.view(DTYPES.get(entry["dtype"], np.uint8)).reshape(entry["shape"])
        return mapped

    def release(self) -> None:
        """Gives back the memory of the pages read so far; they stay in the system's cache, and can be read again."""
        for mapped in self._maps:
            if hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)
