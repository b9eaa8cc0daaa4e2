"""A process of a run ends: the others end too, in a sentence, with status 75. Real runs: torture.py processes."""

import os
import socket
import subprocess
import sys

import pytest
from run_fixtures import ROOT

from specjax.cluster.others import blamed

JOINS = """
import os, signal, sys, time
import jax
from specjax.cluster import others, processes
processes._HEARTBEAT, others.GRACE = 4, 0.5
processes.join(watch=True, workdir=sys.argv[1])
os.write(2, b"a line of XLA's\\n")
if os.environ["SPECJAX_PROCESS"] == sys.argv[2]:
    time.sleep(0.5)
    exec(sys.argv[3])
if "meets" in sys.argv[3]:
    try:
        raise TimeoutError("a barrier") from jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllGather failed: Read error")
    except TimeoutError as error:
        processes.wait_for_the_cause(error)
        sys.exit("not waited")
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("who", "does", "said"),
    [
        (1, "os.kill(os.getpid(), signal.SIGKILL)", "ended or cannot be reached"),
        (0, "os.kill(os.getpid(), signal.SIGKILL)", "ended or cannot be reached"),
        (1, "os.kill(os.getpid(), signal.SIGKILL)  # it meets", "ended or cannot be reached"),
        (1, "processes.leave(2, failed=True, seconds=5); os._exit(2)", "failed (see what it says)"),
    ],
)
def test_one_ends_and_the_other_says_so_and_ends(tmp_path, who, does, said):
    (tmp_path / "checkpoints" / "40").mkdir(parents=True)
    (tmp_path / "checkpoints" / "50.orbax-checkpoint-tmp").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    place = os.environ | {"PYTHONPATH": str(ROOT), "SPECJAX_COORDINATOR": address, "SPECJAX_PROCESSES": "2"}
    command = [sys.executable, "-c", JOINS, str(tmp_path), str(who), does]
    running = [
        subprocess.Popen(command, env=place | {"SPECJAX_PROCESS": str(index)}, stderr=subprocess.PIPE, text=True)
        for index in range(2)
    ]
    try:
        ends = [process.communicate(timeout=50)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [running[who].returncode, running[1 - who].returncode] == [2 if "leave" in does else -9, 75], ends
    one = f"process {who} (pid {running[who].pid} on {socket.gethostname()}) {said}"
    last = "the last checkpoint is of step 40: run the same command again to go on."
    assert ends[1 - who] == f"a line of XLA's\nspecjax: {one}, so this process ends too; {last}\n"


def test_processes_that_do_not_come_are_said():
    assert blamed(b"DEADLINE_EXCEEDED\n\nRPC: /xla.coordination.CoordinationService/RegisterTask", {}) == (
        "not all processes of the run came in time"
    )
    assert blamed(b"of a kind that is not known", {}) == "another process of the run ended or cannot be reached"
