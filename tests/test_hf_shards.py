"""Straight into shards and out of them: every byte once, no second copy on the host, several processes together."""

import contextlib
import json
import math
import os
import shlex
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import assert_same_bits, contents, model, torch_model, weights, xla_flags
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

import specjax as sj
from specjax.errors import UserError
from specjax.hf import export, names, place, strided
from specjax.hf.load import load
from specjax.hf.tensors import Tensors

WIDE = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8, "vocab_size": 2048}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A float32 Llama of 32 MB, most of it in stacked layers."""
    path = tmp_path_factory.mktemp("wide") / "model"
    torch_model(**WIDE).save_pretrained(path, max_shard_size="10MB")
    return path


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces so small that little arrays have several of them."""
    monkeypatch.setattr(strided, "_PIECE", 64)


@st.composite
def views(draw):
    """Two arrays of one shape and of any order of axes, the second a slice of a larger one."""
    shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    dtypes = [np.float32, ml_dtypes.bfloat16, np.float16]

    def array(dtype, extra):
        order = draw(st.permutations(range(len(shape))))
        held = [shape[axis] + (draw(st.integers(0, 2)) if extra else 0) for axis in order]
        values = np.random.default_rng(0).standard_normal(math.prod(held)).astype(dtype).reshape(held)
        seen = values.transpose(np.argsort(order))
        return seen[tuple(slice(seen.shape[axis] - n, None) for axis, n in enumerate(shape))]

    return array(draw(st.sampled_from(dtypes)), False), array(draw(st.sampled_from(dtypes)), True)


@given(views())
@settings(max_examples=400, deadline=None)
def test_a_copy_in_pieces_is_numpys(drawn):
    target, source = drawn
    wanted = np.array(source).astype(target.dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strided, "_PIECE", 64)
        cut = list(strided.pieces(target, source))
        assert sum(part.size for part, _ in cut) == target.size
        for pair in cut:
            strided.copy(*pair)
    np.testing.assert_array_equal(target, wanted)


def test_a_large_copy_is_cut_for_several_threads():
    target, source = np.empty((1 << 13, 1 << 12), np.float32), np.zeros((1 << 12, 1 << 13), np.float32).T
    assert len(list(strided.pieces(target, source))) == 8
    assert len(list(strided.pieces(target, target.copy()))) == 8


@st.composite
def placed(draw):
    """A row of the table, an array of it, and a sharding over 4 x 2 devices."""
    kind = draw(st.sampled_from(["kernel/1", "kernel/2", "flat", "table"]))
    stacked = draw(st.integers(0, 2))
    least = {"kernel/1": 2, "kernel/2": 3, "flat": 1, "table": 2}[kind]
    most = 3 if kind == "flat" else 4
    shape = draw(st.lists(st.sampled_from([1, 2, 3, 8]), min_size=stacked + least, max_size=stacked + most))
    spec: list[str | None] = [None] * len(shape)
    for name, ways in (("fsdp", 4), ("tensor", 2)):
        fit = [axis for axis, size in enumerate(shape) if size % ways == 0 and spec[axis] is None]
        if fit and draw(st.booleans()):
            spec[draw(st.sampled_from(fit))] = name
    stored = draw(st.sampled_from([np.float32, ml_dtypes.bfloat16]))
    array = np.arange(math.prod(shape)).reshape(shape).astype(stored)
    return names.Entry(("w",), "w" + ".{}" * stacked, kind), array, PartitionSpec(*spec)


@pytest.mark.parametrize("host", [True, False], ids=["the host's memory", "an accelerator's"])
@given(placed())
@settings(max_examples=20, deadline=None)
def test_any_row_reaches_any_shards_and_comes_back(host, drawn):
    entry, array, spec = drawn
    hf = {n: np.ascontiguousarray(names.to_hf(array[at], entry.kind)) for at, n in entry.tensors(array.shape)}
    where = NamedSharding(sj.make_mesh(fsdp=4, tensor=2), spec)
    with pytest.MonkeyPatch.context() as patch, place.threads() as pool:
        patch.setattr(place, "_in_host_memory", lambda device: host)
        found = place.place(entry, array.shape, jnp.dtype("bfloat16"), where, hf, pool)
    assert found.dtype == "bfloat16" and found.sharding.is_equivalent_to(where, array.ndim)
    np.testing.assert_array_equal(np.asarray(found), array.astype("bfloat16"))
    for at, name in entry.tensors(array.shape):
        slot = export._Slot(name, entry, at, hf[name].shape, jnp.dtype("bfloat16"), 0, 0)
        back, ranges = export._held(slot, None, {entry.path: found})
        np.testing.assert_array_equal(back, hf[name].astype("bfloat16"))
        assert ranges == [(0, back.nbytes)]


@pytest.mark.parametrize("sizes", [{}, {"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"data": 4, "fsdp": 2}])
def test_every_byte_is_read_once_into_the_memory_of_the_array_itself(wide, monkeypatch, sizes):
    copies = []
    plain = strided.copy
    monkeypatch.setattr(place, "copy", lambda to, of: copies.append((to.ctypes.data, of.nbytes)) or plain(to, of))
    ours, _ = load(wide, mesh=sj.make_mesh(**sizes) if sizes else None, dtype="bfloat16")
    assert sum(size for _, size in copies) == sum(value.nbytes for value in contents(wide).values())
    shards = [shard for array in jax.tree.leaves(ours) for shard in array.addressable_shards]
    for device in jax.devices()[: 8 if sizes else 1]:
        mine = [shard.data for shard in shards if shard.device == device]
        spans = [(data.unsafe_buffer_pointer(), data.nbytes) for data in mine]
        read = sum(size for at, size in copies if any(first <= at < first + size_ for first, size_ in spans))
        assert read == 2 * sum(data.nbytes for data in mine)  # float32 in the files


def peak_bytes(what) -> int:
    """NumPy's memory at its peak, beyond that at the start."""
    tracemalloc.start()
    try:
        what()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_beyond_the_placed_arrays_the_host_holds_two_tensors_at_most(wide, tmp_path, monkeypatch):
    sizes = sorted(value.nbytes for value in contents(wide).values())
    mesh, kept = sj.make_mesh(fsdp=4, tensor=2), []
    load(wide, mesh=mesh, dtype="float32")  # what JAX traces and keeps is not counted
    found = peak_bytes(lambda: kept.append(load(wide, mesh=mesh, dtype="float32")[0])) - sum(sizes)
    assert found < 2 * sizes[-1] < sum(sizes) / 4
    assert peak_bytes(lambda: sj.export(kept[0], None, tmp_path / "out")) < 2 * sizes[-1] + 200_000
    monkeypatch.setattr(place, "_in_host_memory", lambda device: False)
    load(wide, mesh=mesh, dtype="float32")
    assert peak_bytes(lambda: load(wide, mesh=mesh, dtype="float32")) < 2 * sizes[-1]


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_any_stored_dtype_is_cast_to_any_other(tmp_path, stored, dtype):
    import torch

    torch_model(dtype=getattr(torch, stored)).save_pretrained(tmp_path / "in")
    ours, _ = load(tmp_path / "in", dtype=dtype, mesh=sj.make_mesh(fsdp=8))
    sj.export(ours, None, tmp_path / "out", dtype=dtype)
    found = contents(tmp_path / "out")
    for name, value in contents(tmp_path / "in").items():
        np.testing.assert_array_equal(found[name], value.astype(dtype))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype


def test_weights_of_no_floating_point_are_refused_by_name(llama, tmp_path):
    held = load_file(llama / "model.safetensors")
    held["model.norm.weight"] = held["model.norm.weight"].astype(np.int8)
    (tmp_path / "config.json").write_text((llama / "config.json").read_text())
    save_file(held, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"tensor model.norm.weight is stored as I8, and only BF16, F16, F32, F64"):
        load(tmp_path)
    with pytest.raises(UserError, match="dtype int8: weights are written as"):
        sj.export(model(), None, tmp_path / "out", dtype="int8")


def test_a_mesh_that_does_not_fit_is_said_before_anything_is_read(llama, tmp_path):
    (tmp_path / "config.json").write_text((llama / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="axis 'vocab' of size 517 cannot be split 8 ways"):
        load(tmp_path, mesh=sj.make_mesh(fsdp=1, tensor=8))
    with pytest.raises(UserError, match="corrupt or cut short"):
        load(tmp_path, mesh=sj.make_mesh(fsdp=8))


@pytest.mark.parametrize("rows", [517, 520])
def test_a_tied_models_head_of_its_own_is_refused(tmp_path, rows):
    torch_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    head = held["model.embed_tokens.weight"][:rows]
    held["lm_head.weight"] = np.concatenate([head, np.zeros((rows - len(head), 64), np.float32)])
    held["lm_head.weight"][-1, -1] += 1
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="the file holds another: set tie_word_embeddings to false"):
        load(tmp_path)
    if rows == 517:
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
        np.testing.assert_array_equal(
            weights(load(tmp_path, dtype="float32")[0])["lm_head.kernel"], held["lm_head.weight"]
        )


def test_an_embedding_padded_beyond_the_configs_vocabulary_is_refused_as_transformers_does(llama, tmp_path):
    import transformers

    config = json.loads((llama / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 500}))
    (tmp_path / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"model.embed_tokens.weight is \[517, 64\] where config.json says \[500, 64\]"):
        load(tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch|mismatched"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_the_command_that_a_pickled_folder_is_refused_with_converts_it(llama, tmp_path):
    import torch

    folder = tmp_path / "it's pickled"
    folder.mkdir()
    (folder / "config.json").write_text((llama / "config.json").read_text())
    torch.save(torch_model().state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="only pickled weights .* which can run code when opened") as refused:
        load(folder)
    command = str(refused.value).partition("`")[2].partition("`")[0]
    python, *arguments = shlex.split(command)
    assert python == "python"
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    assert str(refused.value).endswith(f"and give {folder}-safetensors.")
    assert_same_bits(
        weights(load(f"{folder}-safetensors", dtype="float32")[0]), weights(load(llama, dtype="float32")[0])
    )


def resident(path: Path) -> int:
    """KiB of a mapped file that count as this process's memory."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    at = next(number for number, line in enumerate(lines) if line.endswith(str(path)))
    return next(int(line.split()[1]) for line in lines[at:] if line.startswith("Rss:"))


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux tells what of a mapping is resident")
def test_the_pages_read_are_given_back_and_can_be_read_again(llama):
    tensors = Tensors([llama / "model.safetensors"])
    before = tensors["lm_head.weight"].copy()
    assert resident(llama / "model.safetensors") >= before.nbytes / 1024
    tensors.release()
    assert resident(llama / "model.safetensors") == 0
    np.testing.assert_array_equal(tensors["lm_head.weight"], before)
    assert not tensors["lm_head.weight"].flags.writeable


PROCESS = """
import os, sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
address, index, source, out = sys.argv[1:]
jax.distributed.initialize(address, 2, int(index))
import numpy as np
import specjax as sj
from specjax.errors import UserError
from specjax.hf import place, strided

sizes = []
place.copy = lambda to, of: (sizes.append(of.nbytes), strided.copy(to, of))
model, _ = sj.load(source, mesh=sj.make_mesh(fsdp=2, tensor=2), dtype="float32")
held = sum(shard.data.nbytes for array in jax.tree.leaves(model) for shard in array.addressable_shards)
print("read", sum(sizes), "held", held)
sj.export(model, None, out + "/whole", shard_bytes=100_000)
assert os.path.isdir(out + "/whole")
try:
    sj.export(model, None, out + "/whole")
except UserError as error:
    print("refused:", error)
write = os.pwrite
def full(*given):
    raise OSError(28, "No space left on device")
if index == "1":
    os.pwrite = full
try:
    sj.export(model, None, out + "/failed")
except (UserError, OSError) as error:
    print("failed:", error)
"""


def test_two_processes_read_their_own_shards_and_write_one_folder_together(tmp_path):
    import socket

    source, out = tmp_path / "in", tmp_path / "out"
    torch_model(vocab_size=520).save_pretrained(source)
    out.mkdir()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {
        "XLA_FLAGS": xla_flags(2),
        "PYTHONPATH": str(Path(__file__).parent.parent),
        "JAX_PLATFORMS": "cpu",
    }
    run = [sys.executable, "-c", PROCESS, address]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(subprocess.Popen([*run, str(i), source, out], env=environment, **pipes))
            for i in range(2)
        ]
        for process in processes:
            stack.callback(process.kill)
        both = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], both
    said = [found for found, _ in both]
    total = sum(value.nbytes for value in contents(source).values())
    for text in said:
        read, held = (int(word) for word in text.split()[1:4:2])
        assert read <= held < 0.6 * total
    assert_same_bits(contents(out / "whole"), contents(source))
    assert [path.name for path in out.iterdir()] == ["whole"]
    assert "refused: " in said[0] and "exists and is not empty" in said[0]
    assert "refused: " in said[1] and "was not written, because process 0 failed" in said[1]
    assert "was not written, because process 1 failed" in said[0]
    assert "failed: [Errno 28] No space left on device" in said[1]
