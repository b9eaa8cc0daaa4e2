"""`specjax launch`: processes of this machine for real; what gcloud, Kubernetes and SLURM would get, read back."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jsonschema
import pytest
import yaml
from run_fixtures import ROOT, specjax

from specjax.cluster import launch
from specjax.errors import UserError

COMMON = (f"--config={ROOT}/configs/lora.py", "--workdir=runs/x y", "--config.steps=3")
TRAIN = ["specjax", "train", COMMON[0], COMMON[2], COMMON[1], "--distributed"]
GCLOUD = ("--on=gcloud-tpu", "--name=t", "--zone=z")
GKE = ("--on=gke", "--name=tune", "--image=me/specjax", "--accelerator=tpu-v5-lite-podslice", "--topology=4x4")
SLURM = ("--on=slurm", "--nodes=2", "--gpus_per_node=8")
SCHEMA = json.loads((Path(__file__).parent / "schemas" / "jobset.json").read_text())


def shown(capsys, *argv: str) -> str:
    assert specjax("launch", *COMMON, *argv, "--dry-run") == 0
    return capsys.readouterr().out


def stand_ins(*bodies: str) -> list:
    """A command a text, each a Python script."""
    start = "import os, signal, sys, time\n"
    return [([sys.executable, "-u", "-c", start + body], os.environ) for body in bodies]


def test_gcloud_runs_one_command_on_all_workers(capsys):
    command = shlex.split(shown(capsys, *GCLOUD, "--project=p", "--setup=cd specjax"))
    assert command[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "t"]
    assert command[6:9] == ["--zone=z", "--project=p", "--worker=all"]
    [line] = [word.removeprefix("--command=") for word in command if word.startswith("--command=")]
    assert shlex.split(line) == ["cd", "specjax", "&&", *TRAIN]
    slices = shlex.split(shown(capsys, *GCLOUD, "--slices=2"))
    assert slices[:5] == ["gcloud", "compute", "tpus", "queued-resources", "ssh"]
    assert {"--node=all", "--worker=all"} < set(slices)


@pytest.mark.parametrize(
    ("accelerator", "topology", "hosts", "chips"),
    [("tpu-v5-lite-podslice", "4x4", 4, 4), ("tpu-v5p-slice", "2x2x4", 4, 4), ("tpu-v6e-slice", "1x1", 1, 1)],
)
def test_gke_gets_a_jobset_with_a_pod_a_host(capsys, accelerator, topology, hosts, chips):
    more = ("--namespace=ml", "--slices=2", "--restarts=3", "--bucket=b", "--service_account=s")
    argv = (*GKE, *more, f"--accelerator={accelerator}", f"--topology={topology}")
    manifest = yaml.safe_load(shown(capsys, *argv))
    jsonschema.validate(manifest, SCHEMA)
    [job] = manifest["spec"]["replicatedJobs"]
    assert (job["replicas"], manifest["spec"]["failurePolicy"]["maxRestarts"]) == (2, 3)
    spec = job["template"]["spec"]
    assert (spec["parallelism"], spec["completions"]) == (hosts, hosts)
    pod = spec["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == topology
    [container] = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": chips}
    assert shlex.split(container["command"][2]) == TRAIN


BROKEN = {
    "a misspelt key": lambda pod, job: pod.update(nodeselector={}),
    "a text for a list": lambda pod, job: pod["containers"][0].update(command="a text"),
    "a word for a number": lambda pod, job: job.update(replicas="two"),
    "a container without a name": lambda pod, job: pod["containers"][0].pop("name"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_the_schema_refuses_what_kubernetes_would(capsys, how):
    manifest = yaml.safe_load(shown(capsys, *GKE))
    [job] = manifest["spec"]["replicatedJobs"]
    BROKEN[how](job["template"]["spec"]["template"]["spec"], job)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(manifest, SCHEMA)


def test_slurm_gets_a_script_that_bash_reads_and_that_comes_back_once_stopped(capsys, tmp_path):
    text = shown(capsys, *SLURM, "--time=1:00:00", "--setup=module load python")
    settings = {line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")}
    assert {"--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--time=1:00:00", "--requeue"} < settings
    # The cluster's own programs, in short: srun runs the line, which here is stopped; scontrol says what it gets.
    for name, body in {
        "srun": 'shift; printf "%s\\n" "$@" > ran; exit 143',
        "scontrol": 'echo "$@"',
        "module": "",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    place = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash"], input=text, env=place, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (143, "requeue 7\n", "")
    assert (tmp_path / "ran").read_text().splitlines() == TRAIN


def test_an_engines_own_program_gets_it(capfd, tmp_path, monkeypatch):
    (tmp_path / "kubectl").write_text('#!/bin/bash\necho "$@"\ncat > got\nexit 5\n')
    (tmp_path / "kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    assert specjax("launch", *COMMON, *GKE) == 5
    assert capfd.readouterr().out == "apply -f -\n"
    jsonschema.validate(yaml.safe_load((tmp_path / "got").read_text()), SCHEMA)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--on=gcloud",), "--on=gcloud: give local:N, such as local:2, or gcloud-tpu, gke or slurm. Did you mean"),
        (("--on=local",), "--on=local: give local:N"),
        (("--on=local:0",), "--on=local:0: give local:N"),
        (("--on=slurm:2",), "--on=slurm:2: give"),
        (("--on=gcloud-tpu", "--zone=z"), "--on=gcloud-tpu needs --name."),
        ((*SLURM, "--zone=z"), "--zone is no flag of --on=slurm, which takes --nodes"),
        (("--on=local:2", "--name=x"), "--name is no flag of --on=local, which takes none of its own."),
        ((*GKE, "--accelerator=tpu-v5e"), "--accelerator=tpu-v5e: give one of"),
        ((*GKE, "--topology=16"), "--topology=16: give the chips of a slice"),
        ((*GKE, "--name=My_Run"), "--name=My_Run: Kubernetes takes"),
        ((*SLURM, "--config.stepz=1"), "--config.stepz is no key"),
        ((*SLURM, "--workdir=gs://b/x"), "--workdir=gs://b/x is no folder: mount the bucket"),
        (GCLOUD, "`gcloud` is not installed here"),
        ((), "`specjax launch` needs --on"),
    ],
)
def test_a_mistake_is_one_sentence(argv, said, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert specjax("launch", *COMMON, *argv) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1


def test_output_has_the_process_before_each_line_and_the_first_failure_ends_all(capfd, tmp_path):
    there = repr(str(tmp_path / "there"))
    dies = f"while not os.path.exists({there}): time.sleep(0.01)\nprint('dying', file=sys.stderr); sys.exit(3)"
    hangs = "signal.signal(signal.SIGTERM, lambda *a: None); print('hangs')"
    hangs += f"; open({there}, 'w'); time.sleep(100); print('woke')"
    assert launch.run_all(stand_ins(dies, hangs), grace=0.5) == 3
    out, err = capfd.readouterr()
    assert (out, err) == ("[1] hangs\n", "[0] dying\n")


def test_one_that_is_killed_ends_all_and_a_good_end_is_0(capfd):
    assert launch.run_all(stand_ins("os.kill(os.getpid(), signal.SIGKILL)", "time.sleep(600)"), grace=0.2) == 137
    assert launch.run_all(stand_ins("time.sleep(600)", "sys.exit(4)"), grace=0.2) == 4
    [said] = capfd.readouterr().err.splitlines()
    assert re.fullmatch(
        r"specjax: process 0 \(pid \d+\) was ended by SIGKILL, and the others end within 0.2 seconds; run .*", said
    )
    assert launch.run_all(stand_ins("", "time.sleep(0.3)")) == 0


def test_gpus_are_dealt_out(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    assert launch._shares(2) == [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}]
    assert launch._shares(1) == [{}]
    with pytest.raises(UserError, match="4 GPUs do not divide into 3 processes"):
        launch._shares(3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    (tmp_path / "nvidia-smi").write_text("#!/bin/bash\necho 'GPU 0: H100'\necho 'GPU 1: H100'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert launch._shares(2) == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]


def test_sigterm_goes_to_all_and_each_may_save_as_long_as_it_takes(capfd, tmp_path):
    """Real training that is told so, and gone on with: test_processes.py."""
    saves = "signal.signal(signal.SIGTERM, lambda *a: (time.sleep(0.5), print('saved'), sys.exit(143)))\n"
    there = [tmp_path / "0", tmp_path / "1"]

    def tell():
        while not all(map(Path.exists, there)):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    teller = threading.Thread(target=tell)
    teller.start()
    waits = (f"{saves}open({str(path)!r}, 'w'); time.sleep(100); print('woke')" for path in there)
    assert launch.run_all(stand_ins(*waits), grace=0.1) == 143
    teller.join()
    assert sorted(capfd.readouterr().out.splitlines()) == ["[0] saved", "[1] saved"]
