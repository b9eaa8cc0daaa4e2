"""How a checkpoint reaches its devices: time, host memory, bytes read.

    python benchmarks/load.py [--layers=10] [--stored=bfloat16] [--dtype=bfloat16] [--repeats=5] [--folder=TMP]

Writes a random Llama (1.5 GB of bfloat16 in two files), loads it on 1 device and over 8 (fsdp 4 x tensor 2), and prints

    load     seconds of `specjax.load`, warm page cache
    read     seconds of `numpy.fromfile` on the same files: the same bytes, neither transposed nor stacked nor placed
    numpy    seconds of NumPy alone for the same arrays: `safetensors`' `load_file`, transpose, cast, stack
    memory   the peak of anonymous memory (RssAnon) during a load, less what it placed, in units of the files' largest
             tensor; mapped pages of files (RssFile) are the system's cache and are shown apart
    bytes    read by each device by its share of the model, the largest of all devices
    export   seconds of `specjax.export`, of `numpy.tofile` for the same bytes, and its memory as above

The first three are interleaved, so that what else the machine does falls on all; ratios are medians of a round's.
"""

import argparse
import gc
import json
import math
import multiprocessing
import os
import struct
import sys
import tempfile
import threading
import time
import unittest.mock
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

ROOT = Path(__file__).parent.parent
MESHES = {1: (1, 1), 8: (4, 2)}  # fsdp, tensor
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64000,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}


def write(folder: Path, layers: int, stored: str) -> None:
    """The checkpoint: one draw of noise, turned on for each tensor."""
    c = LLAMA | {"num_hidden_layers": layers, "dtype": stored}
    d, f, kv = c["hidden_size"], c["intermediate_size"], c["num_key_value_heads"] * c["head_dim"]
    maps = {"self_attn.q_proj": (d, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d)}
    maps |= {"self_attn.o_proj": (d, d), "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f)}
    norms = {"input_layernorm": (d,), "post_attention_layernorm": (d,)}
    one = {f"{name}.weight": shape for name, shape in (maps | norms).items()}
    shapes = {"model.embed_tokens.weight": (c["vocab_size"], d), "model.norm.weight": (d,)}
    shapes |= {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in one.items()}
    dtype = np.dtype(getattr(ml_dtypes, stored, stored))
    noise = (0.02 * np.random.default_rng(0).standard_normal(1 << 22)).astype(dtype)
    (folder / "config.json").write_text(json.dumps(c))
    everything = list(shapes)
    where: dict[str, str] = {}
    for number, held in enumerate((everything[: len(everything) // 2], everything[len(everything) // 2 :]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        where |= dict.fromkeys(held, file)
        header: dict[str, Any] = {}
        end = 0
        for name in held:
            begin, end = end, end + math.prod(shapes[name]) * dtype.itemsize
            code = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[stored]
            header[name] = {"dtype": code, "shape": shapes[name], "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            for number_, name in enumerate(held):
                size = math.prod(shapes[name])
                turned = np.roll(noise, 7919 * number_)
                stream.write(np.tile(turned, -(-size // len(noise)))[:size].tobytes())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


class Memory(threading.Thread):
    """The peaks of a kind of this process's memory, looked at every few milliseconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.first = self._now()
        self.peak = dict(self.first)
        self._done = threading.Event()
        self.start()

    def run(self) -> None:
        """Until `stop`."""
        while not self._done.wait(0.003):
            self._look()

    def stop(self) -> dict[str, int]:
        """Bytes at the peak beyond those at the start, by kind."""
        self._done.set()
        self.join()
        self._look()
        return {kind: self.peak[kind] - self.first[kind] for kind in self.peak}

    def _look(self) -> None:
        now = self._now()
        self.peak = {kind: max(self.peak[kind], now[kind]) for kind in now}

    @staticmethod
    def _now() -> dict[str, int]:
        lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
        return {line[0][:-1]: int(line[1]) * 1024 for line in lines if line[0] in ("RssAnon:", "RssFile:")}


def measure(folder: Path, devices: int, stored: str, dtype: str, repeats: int) -> dict[str, float]:
    """Everything about one number of devices, in a fresh process."""
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path.insert(0, str(ROOT))
    import jax

    import specjax as sj
    from specjax.hf import strided

    fsdp, tensor = MESHES[devices]
    mesh = sj.make_mesh(fsdp=fsdp, tensor=tensor)

    def load_model() -> Any:
        return sj.load(folder, mesh=mesh, dtype=dtype)[0]

    def load() -> list[jax.Array]:
        return jax.block_until_ready(jax.tree.leaves(load_model()))

    jax.block_until_ready([jax.device_put(np.ones(3), device) for device in jax.devices()])
    files = sorted(folder.glob("*.safetensors"))
    load()  # what is imported and traced once is no part of it
    bytes_read(files)
    gc.collect()  # a model refers to itself
    memory = Memory()
    arrays = load()
    peaks = memory.stop()
    placed = sum({shard.data.unsafe_buffer_pointer(): shard.data.nbytes for shard in shards(arrays)}.values())

    copies: list[tuple[int, int]] = []  # address and bytes read

    def counted(target: np.ndarray, source: np.ndarray) -> None:
        copies.append((target.ctypes.data, source.nbytes))
        strided.copy(target, source)

    with unittest.mock.patch("specjax.hf.place.copy", counted):
        arrays = load()
    itemsize = np.dtype(getattr(ml_dtypes, stored, stored)).itemsize
    share = 0.0
    for device in jax.devices():
        mine = [shard.data for shard in shards(arrays) if shard.device == device]
        spans = [(data.unsafe_buffer_pointer(), data.nbytes) for data in mine]
        read = sum(size for at, size in copies if any(start <= at < start + n for start, n in spans))
        share = max(share, read / sum(data.size * itemsize for data in mine))
    del arrays
    export, wrote, export_memory = out_again(folder, load_model)
    rounds = [
        [timed(load), timed(lambda: bytes_read(files)), timed(lambda: by_numpy(files, dtype))] for _ in range(repeats)
    ]
    best = np.min(rounds, axis=0)
    return {
        "load": best[0],
        "read": best[1],
        "numpy": best[2],
        "load/read": float(np.median([load / read for load, read, _ in rounds])),
        "load/numpy": float(np.median([load / same for load, _, same in rounds])),
        "placed": placed,
        "memory": (peaks["RssAnon"] - placed) / largest(files),
        "mapped": peaks["RssFile"],
        "bytes": share,
        "export": export,
        "write": wrote,
        "export memory": export_memory / largest(files),
    }


def out_again(folder: Path, load_model: Callable[[], Any]) -> tuple[float, float, int]:
    """Seconds of an export, of writing its bytes alone, and the peak of memory beyond the model."""
    import specjax as sj

    exported = load_model()
    memory = Memory()
    began = time.perf_counter()
    sj.export(exported, None, folder / "out")
    seconds = time.perf_counter() - began
    peak = memory.stop()["RssAnon"]
    del exported
    whole = bytes_read(sorted((folder / "out").glob("*.safetensors")))

    def write_plainly() -> None:
        for number, part in enumerate(whole):
            part.tofile(folder / f"plain-{number}")

    wrote = timed(write_plainly)
    for path in [*folder.glob("plain-*"), *(folder / "out").iterdir()]:
        path.unlink()
    (folder / "out").rmdir()
    return seconds, wrote, peak


def shards(arrays: list[Any]) -> list[Any]:
    """All shards of some arrays."""
    return [shard for array in arrays for shard in array.addressable_shards]


def largest(files: list[Path]) -> int:
    """Bytes of the files' largest tensor."""
    found = 0
    for file in files:
        with file.open("rb") as stream:
            header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
        found = max(found, *(e["data_offsets"][1] - e["data_offsets"][0] for n, e in header.items() if n[0] != "_"))
    return found


def bytes_read(files: list[Path]) -> list[np.ndarray]:
    """All bytes of the files, held together."""
    return [np.fromfile(file, np.uint8) for file in files]


def by_numpy(files: list[Path], dtype: str) -> dict[str, np.ndarray]:
    """The arrays that a loader without care makes: everything read, each kernel transposed, cast, layers stacked."""
    from safetensors.numpy import load_file

    tensors = {name: value for file in files for name, value in load_file(file).items()}
    target = np.dtype(getattr(ml_dtypes, dtype, dtype))
    groups: dict[str, list[np.ndarray]] = {}
    for name in sorted(tensors):
        parts = name.split(".")
        key = ".".join(part for part in parts if not part.isdigit())
        value = tensors[name].T if "_proj" in name else tensors[name]
        groups.setdefault(key, []).append(np.ascontiguousarray(value.astype(target)))
    return {key: np.stack(values) for key, values in groups.items()}


def timed(what: Callable[[], Any]) -> float:
    """Seconds; what it made is let go of."""
    gc.collect()
    began = time.perf_counter()
    made = what()
    seconds = time.perf_counter() - began
    del made
    return seconds


def main() -> None:
    """Writes the checkpoint, measures each number of devices in a process of its own, prints a table."""
    parser = argparse.ArgumentParser(description="How a checkpoint reaches its devices.")
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--stored", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where 2 GB are free; default the system's")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        write(folder, arguments.layers, arguments.stored)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        print(f"{size / 1e9:.2f} GB of {arguments.stored} to {arguments.dtype}", flush=True)
        print("devices | load s, read s, numpy s | load/read, load/numpy | memory, mapped GB | bytes | ", end="")
        print("export s, write s, memory", flush=True)
        for devices in MESHES:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                r = pool.submit(measure, folder, devices, arguments.stored, arguments.dtype, arguments.repeats).result()
            print(
                f"{devices} | {r['load']:.2f}, {r['read']:.2f}, {r['numpy']:.2f} | {r['load/read']:.2f}, "
                f"{r['load/numpy']:.2f} | {r['memory']:.2f}, {r['mapped'] / 1e9:.2f} | {r['bytes']:.3f} | "
                f"{r['export']:.2f}, {r['write']:.2f}, {r['export memory']:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
