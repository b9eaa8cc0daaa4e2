import io
import json
import re
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from specjax.errors import UserError
from specjax.train.metrics import Log

TEXT = "Because\nit\u2028is\x85\x1cso."  # whatever ends a line elsewhere, a line of ours ends with \\n


def console(terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=200)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]


def run(folder: Path | None, first: int, last: int, start: int = 0, **options) -> str:
    out = options.pop("console", None) or console()
    with Log(folder, steps=10, start=start, console=out, **options) as log:
        if start == 0:
            log.evaluate(0, {"eval/domain/loss": 1.5})
        for step in range(first, last + 1):
            log.train(step, {"loss": np.float32(step), "tokens": np.int64(64), "tokens_per_s": 1234.5, "lr": 1e-4})
            if step % 2 == 0:
                log.evaluate(step, {"eval/domain/loss": 0.5})
                log.sample(step, "Why?", TEXT)
    return out.file.getvalue()


def test_every_logged_step_is_a_json_line(tmp_path):
    run(tmp_path, 1, 2, tensorboard=False)
    assert rows(tmp_path / "metrics.jsonl") == [
        {"step": 0, "eval/domain/loss": 1.5},
        {"step": 1, "loss": 1.0, "tokens": 64, "tokens_per_s": 1234.5, "lr": 1e-4},
        {"step": 2, "loss": 2.0, "tokens": 64, "tokens_per_s": 1234.5, "lr": 1e-4},
        {"step": 2, "eval/domain/loss": 0.5},
    ]
    assert rows(tmp_path / "samples.jsonl") == [{"step": 2, "prompt": "Why?", "text": TEXT}]


def test_lines_are_on_disk_before_the_run_ends(tmp_path):
    log = Log(tmp_path, steps=2, tensorboard=False, console=console())
    log.train(1, {"loss": 1.0})
    assert rows(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 1.0}]
    log.close()
    log.close()


@pytest.mark.parametrize("start", [0, 1, 2, 3])
def test_a_resumed_run_leaves_the_files_of_one_that_never_stopped(tmp_path, start):
    run(tmp_path / "whole", 1, 6, tensorboard=False)
    run(tmp_path / "killed", 1, 4, tensorboard=False)
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "lo')  # killed in the middle of a write
    run(tmp_path / "killed", start + 1, 6, start=start, tensorboard=False)
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert rows(tmp_path / "killed" / name) == rows(tmp_path / "whole" / name)
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == ["metrics.jsonl", "samples.jsonl"]


def test_values_that_json_lacks_are_null(tmp_path):
    with Log(tmp_path, steps=1, tensorboard=False, console=console()) as log:
        log.train(1, {"loss": float("nan"), "grad_norm": np.float32("inf")})
    assert rows(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": None, "grad_norm": None}]


def test_a_pipe_gets_one_plain_line_a_step(tmp_path):
    lines = run(None, 1, 3).splitlines()
    assert lines[1] == "step 1/10  loss 1.0000  lr 1.00e-04  1,234 tokens/s"
    assert re.fullmatch(r"step 3/10  loss 3.0000 .* 0:00 left", lines[-1])
    assert "step 2/10  eval/domain/loss 0.5000" in lines
    assert not any("\x1b" in line for line in lines)


def test_a_terminal_gets_a_bar_that_starts_where_the_run_resumes(tmp_path):
    shown = run(None, 8, 10, start=7, console=console(terminal=True))
    assert "10/10" in shown
    assert "7/10" in shown
    assert "tokens/s" in shown


def test_without_a_workdir_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(None, 1, 2, wandb="project")
    assert not list(tmp_path.iterdir())


def events(folder: Path) -> list[Event]:
    found = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:  # TFRecord: length, its checksum, the event, its checksum
            (size,) = struct.unpack_from("<Q", data)
            found.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


def test_tensorboard_gets_scalars_and_is_told_what_a_resume_drops(tmp_path):
    run(tmp_path, 1, 4)
    first = {(v.tag, e.step): v.simple_value for e in events(tmp_path / "tensorboard") for v in e.summary.value}
    assert first["train/loss", 3] == 3.0
    assert first["eval/domain/loss", 2] == 0.5
    run(tmp_path, 3, 5, start=2)
    assert [e.step for e in events(tmp_path / "tensorboard") if e.HasField("session_log")] == [0, 3]


def test_wandb_that_is_not_installed_is_a_users_mistake(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        Log(tmp_path, steps=1, wandb="project", console=console())


def test_wandb_continues_the_page_of_a_resumed_run(tmp_path, monkeypatch):
    calls: list[dict] = []
    logged: list[tuple] = []
    fake = SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: logged.append("end"))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **how: calls.append(how) or fake))
    for start in (0, 1):
        with Log(tmp_path, steps=2, start=start, wandb="project", config={"seed": 0}, console=console()) as log:
            log.train(start + 1, {"loss": 1.0})
    assert calls[0]["id"] == calls[1]["id"]
    assert calls[0]["project"] == "project"
    assert calls[0]["config"] == {"seed": 0}
    assert logged == [(1, {"loss": 1.0}), "end", (2, {"loss": 1.0}), "end"]


class Filling(io.BufferedWriter):
    """A file that takes some bytes, and then is on a full disk."""

    def __init__(self, left):
        super().__init__(io.FileIO("/dev/full", "w"))
        self.left = left

    def write(self, content):
        self.left -= len(content)
        return super().write(content) if self.left < 0 else len(content)


@pytest.mark.parametrize("breaks", ["a file in its place", "a full disk", "a disk that gets full"])
def test_a_tracker_that_fails_is_said_once_and_the_run_goes_on(tmp_path, monkeypatch, breaks):
    if breaks == "a file in its place":
        (tmp_path / "tensorboard").write_text("mine")
    else:
        left = 500 if "gets" in breaks else 0
        monkeypatch.setattr("tensorboardX.record_writer.open_file", lambda path: Filling(left))
    out = run(tmp_path, 1, 40, console=console())
    assert out.count("TensorBoard failed and is told nothing more; the run goes on (") == 1
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")][-1] == 40


def test_wandb_that_is_down_is_said_once_and_the_run_goes_on(tmp_path, monkeypatch):
    def down(*given, **how):
        raise ConnectionError("no route to host")

    for init in (down, lambda **how: SimpleNamespace(log=down, finish=down)):
        monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
        out = run(tmp_path, 1, 4, wandb="project", tensorboard=False, console=console())
        assert out.count("W&B failed and is told nothing more") == 1 and "no route to host" in out


@pytest.mark.parametrize("row", ["[1]", '{"loss": 1}', '{"step": "1"}', "\0\0\0", "\udcff"])
@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_a_line_that_no_run_wrote_is_one_sentence_at_resume(tmp_path, name, row):
    run(tmp_path, 1, 2, tensorboard=False)
    path = tmp_path / name
    path.write_bytes(row.encode(errors="surrogateescape") + b"\n" + path.read_bytes())
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    said = rf"{name}:1 (has no step|cannot be read \(.*\)): restore the file, or delete it\.$"
    with pytest.raises(UserError, match=said):
        run(tmp_path, 3, 4, start=2, tensorboard=False)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
