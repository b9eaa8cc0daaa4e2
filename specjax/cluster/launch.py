"""The same command on every host: what `specjax launch` hands to those who start and schedule processes.

Each starts `specjax train --distributed` with the flags given: processes of this machine, the workers of a TPU VM by
gcloud, a JobSet of Kubernetes on GKE, a SLURM job. A run that is stopped resumes where it was: so all of them may start
it again.
"""

import contextlib
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TextIO

from specjax.errors import UserError, nearest

# What a process of this machine is told; elsewhere JAX asks the cluster.
COORDINATOR, COUNT, INDEX = "SPECJAX_COORDINATOR", "SPECJAX_PROCESSES", "SPECJAX_PROCESS"

# engine -> the flags that it needs, those that it may have
ENGINES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "local": ((), ()),
    "gcloud-tpu": (("name", "zone"), ("project", "slices", "setup")),
    "gke": (
        ("name", "image", "accelerator", "topology"),
        ("namespace", "slices", "restarts", "bucket", "service_account", "setup"),
    ),
    "slurm": (("nodes", "gpus_per_node"), ("name", "time", "partition", "account", "setup")),
}
_GRACE = 15.0  # seconds that the others have for a last word once one has failed
_SAVING = 600.0  # once one was told to stop: they write a checkpoint
# GKE's names of TPUs, and the chips of one host of theirs: docs.cloud.google.com/kubernetes-engine/docs/concepts/tpus
_CHIPS = {
    "tpu-v4-podslice": 4,
    "tpu-v5-lite-podslice": 4,
    "tpu-v5p-slice": 4,
    "tpu-v6e-slice": 4,
    "tpu7x": 4,
}
_BUCKET = "/bucket"  # where a bucket is mounted


def launch(on: str, config: Sequence[str], workdir: str, *, dry_run: bool = False, **given: Any) -> int:
    """Starts a training run on an engine, or prints what would start it.

    Args:
      on: `local:N`, `gcloud-tpu`, `gke` or `slurm`.
      config: the flags that name the config and change it, as they were given.
      workdir: the run's folder, which all processes share.
      dry_run: print, and start nothing.
      given: the flags of engines; None and 0 are not given.

    Returns:
      The exit status.

    Raises:
      UserError: no such engine, a flag that it needs or does not know, or its program is not installed.
    """
    engine, _, count = on.partition(":")
    if engine not in ENGINES or (engine == "local") != bool(re.fullmatch(r"[1-9]\d*", count)) or on.endswith(":"):
        raise UserError(f"--on={on}: give local:N, such as local:2, or gcloud-tpu, gke or slurm.{nearest(on, ENGINES)}")
    flags = _checked(engine, given)
    train = ["train", *config, f"--workdir={workdir}", "--distributed"]
    if engine == "local":
        return _local(int(count), train, dry_run)
    line = shlex.join(["specjax", *train])
    if flags.get("setup"):
        line = f"{flags['setup']} && {line}"
    match engine:
        case "gcloud-tpu":
            return _run(_gcloud(line, flags), dry_run)
        case "gke":
            return _run(["kubectl", "apply", "-f", "-"], dry_run, _yaml(jobset(line, flags)))
        case _:
            return _run(["sbatch"], dry_run, sbatch(train, flags))


def _checked(engine: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that were given, all of them this engine's."""
    needs, may = ENGINES[engine]
    flags = {name: value for name, value in given.items() if value}
    for name in flags:
        if name not in (*needs, *may):
            known = ", ".join(f"--{one}" for one in (*needs, *may)) or "none of its own"
            raise UserError(f"--{name} is no flag of --on={engine}, which takes {known}.")
    for name in needs:
        if name not in flags:
            raise UserError(f"--on={engine} needs --{name}.")
    if engine == "gke" and not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", flags["name"]):
        raise UserError(f"--name={flags['name']}: Kubernetes takes at most 40 small letters, digits and hyphens.")
    return flags


def _run(command: list[str], dry_run: bool, text: str | None = None) -> int:
    """Runs an engine's own program, with `text` for its input; or prints what it would get."""
    if dry_run:
        print(shlex.join(command) if text is None else text, end="\n" if text is None else "")
        return 0
    if shutil.which(command[0]) is None:
        raise UserError(f"`{command[0]}` is not installed here: install it, or see with --dry_run what it would get.")
    return subprocess.run(command, input=text, text=True).returncode


def _gcloud(line: str, flags: Mapping[str, Any]) -> list[str]:
    """One command on all workers: https://cloud.google.com/sdk/gcloud/reference/compute/tpus/tpu-vm/ssh."""
    where = [flags["name"], f"--zone={flags['zone']}"]
    if "project" in flags:
        where.append(f"--project={flags['project']}")
    if flags.get("slices", 1) > 1:
        return [
            "gcloud",
            "compute",
            "tpus",
            "queued-resources",
            "ssh",
            *where,
            "--node=all",
            "--worker=all",
            f"--command={line}",
        ]
    return ["gcloud", "compute", "tpus", "tpu-vm", "ssh", *where, "--worker=all", f"--command={line}"]


def jobset(line: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    """A JobSet: a job a slice, a pod a host, all started again together when one fails.

    https://jobset.sigs.k8s.io/docs/tasks/tpu_multislice; the TPU's webhook of GKE tells each pod who the others are.

    Raises:
      UserError: an accelerator that is not known, or a topology that is none.
    """
    accelerator, topology, slices = flags["accelerator"], flags["topology"], flags.get("slices", 1)
    if accelerator not in _CHIPS:
        raise UserError(f"--accelerator={accelerator}: give one of {', '.join(_CHIPS)}.{nearest(accelerator, _CHIPS)}")
    if not re.fullmatch(r"\d+x\d+(x\d+)?", topology):
        raise UserError(f"--topology={topology}: give the chips of a slice, such as 4x4 or 2x2x4.")
    chips = math.prod(map(int, topology.split("x")))
    here = min(chips, _CHIPS[accelerator])
    container: dict[str, Any] = {
        "name": "specjax",
        "image": flags["image"],
        "command": ["bash", "-c", line],
        "ports": [{"containerPort": 8471}, {"containerPort": 8476}],
        "resources": {"limits": {"google.com/tpu": here}, "requests": {"google.com/tpu": here}},
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        # SIGTERM comes first: time to write a checkpoint.
        "terminationGracePeriodSeconds": 300,
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": accelerator,
            "cloud.google.com/gke-tpu-topology": topology,
        },
        "containers": [container],
    }
    template: dict[str, Any] = {"spec": pod}
    if "service_account" in flags:
        pod["serviceAccountName"] = flags["service_account"]
    if "bucket" in flags:
        template["metadata"] = {"annotations": {"gke-gcsfuse/volumes": "true"}}
        attributes = {"bucketName": flags["bucket"], "mountOptions": "implicit-dirs"}
        source = {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes}
        pod["volumes"] = [{"name": "bucket", "csi": source}]
        container["volumeMounts"] = [{"name": "bucket", "mountPath": _BUCKET}]
    hosts = chips // here
    job = {"parallelism": hosts, "completions": hosts, "backoffLimit": 0, "completionMode": "Indexed"}
    metadata: dict[str, Any] = {"name": flags["name"]}
    if "namespace" in flags:
        metadata["namespace"] = flags["namespace"]
    if slices > 1:
        metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": {"maxRestarts": flags.get("restarts", 10)},
            "replicatedJobs": [
                {"name": "slice", "replicas": slices, "template": {"spec": job | {"template": template}}},
            ],
        },
    }


def _yaml(manifest: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(manifest, sort_keys=False, width=1000)


def sbatch(train: Sequence[str], flags: Mapping[str, Any]) -> str:
    """A SLURM script: a process a GPU, told to save before the time is up, then queued again.

    JAX finds the others by SLURM's own variables, and takes the GPU of the task's local number.
    """
    settings = {
        "job-name": flags.get("name", "specjax"),
        "nodes": flags["nodes"],
        "ntasks-per-node": flags["gpus_per_node"],
        "gpus-per-node": flags["gpus_per_node"],
        **{name: flags[name] for name in ("time", "partition", "account") if name in flags},
        "output": "%x-%j.out",
        "open-mode": "append",
    }
    lines = ["#!/bin/bash", *(f"#SBATCH --{name}={value}" for name, value in settings.items())]
    lines += ["#SBATCH --requeue", "#SBATCH --signal=TERM@300", ""]
    if flags.get("setup"):
        lines.append(f"{flags['setup']} || exit 1")
    return "\n".join(
        [
            *lines,
            "srun --kill-on-bad-exit=1 " + shlex.join(["specjax", *train]),
            "status=$?",
            "# 143: it was told to stop, and has saved.",
            'if [ "$status" -eq 143 ]; then scontrol requeue "$SLURM_JOB_ID"; fi',
            'exit "$status"',
            "",
        ]
    )


def _local(count: int, train: Sequence[str], dry_run: bool) -> int:
    """Processes of this machine: their output with the number before each line, all ended when one fails."""
    command = [sys.executable, "-m", "specjax", *train]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    places = [
        {COORDINATOR: address, COUNT: str(count), INDEX: str(index)} | share
        for index, share in enumerate(_shares(count))
    ]
    if dry_run:
        for place in places:
            print(*(f"{name}={value}" for name, value in place.items()), shlex.join(command))
        return 0
    return run_all([(command, os.environ | place) for place in places])


def _shares(count: int) -> list[dict[str, str]]:
    """Which of this machine's GPUs each process sees; nothing, where there are none or one process has all."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if seen is not None:
        gpus = [one for one in seen.split(",") if one]
    elif shutil.which("nvidia-smi") and count > 1:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True).stdout
        gpus = [str(number) for number, line in enumerate(listed.splitlines()) if line.startswith("GPU ")]
    else:
        gpus = []
    if not gpus or count == 1:
        return [{}] * count
    if len(gpus) % count:
        raise UserError(f"--on=local:{count}: {len(gpus)} GPUs do not divide into {count} processes.")
    each = len(gpus) // count
    return [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[i * each : (i + 1) * each])} for i in range(count)]


def run_all(commands: Sequence[tuple[list[str], Mapping[str, str]]], *, grace: float = _GRACE) -> int:
    """Runs commands beside each other to their end; returns 0, or the status of the first that failed.

    SIGTERM and SIGINT are passed on. Once one has failed the others have `grace` seconds, longer where they were told
    to stop and save; then they are killed.
    """
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
    running: list[subprocess.Popen[str]] = []
    with contextlib.ExitStack() as stack:
        told = stack.enter_context(_passed_on(running))
        for command, environment in commands:
            # A session of its own: what the terminal sends to all of its group comes through here, once.
            running.append(subprocess.Popen(command, env=dict(environment), start_new_session=True, **pipes))
            stack.callback(_end, running[-1])
        readers = [
            threading.Thread(target=_relay, args=(stream, out, f"[{number}] "))
            for number, process in enumerate(running)
            for stream, out in ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
        ]
        for reader in readers:
            reader.start()
        status, deadline = 0, math.inf
        while None in [process.poll() for process in running] and time.monotonic() < deadline:
            failed = [process.returncode for process in running if process.returncode]
            if failed and not status:
                status = failed[0] if failed[0] > 0 else 128 - failed[0]  # as a shell has it
                deadline = time.monotonic() + (_SAVING if told or status == 143 else grace)
                if not told:
                    _say_killed(running, grace)
            time.sleep(0.05)
        for process in running:
            _end(process)
        for reader in readers:
            reader.join()
        failed = [process.returncode for process in running if process.returncode]
        return status or next((code if code > 0 else 128 - code for code in failed), 0)


def _say_killed(running: "Sequence[subprocess.Popen[str]]", grace: float) -> None:
    """One that failed otherwise has said why."""
    for number, process in enumerate(running):
        if process.returncode is not None and process.returncode < 0:
            named = {one.value: one.name for one in signal.Signals}  # real-time signals have no name
            name = named.get(-process.returncode, f"signal {-process.returncode}")
            print(
                f"specjax: process {number} (pid {process.pid}) was ended by {name}, and the others end within "
                f"{grace:g} seconds; run the same command again to go on.",
                file=sys.stderr,
                flush=True,
            )


def _end(process: "subprocess.Popen[str]") -> None:
    """Kills a process that is still there, and waits for it."""
    if process.poll() is None:
        process.kill()
    process.wait()


@contextlib.contextmanager
def _passed_on(running: "Sequence[subprocess.Popen[str]]") -> Iterator[list[int]]:
    """SIGTERM and SIGINT go to all processes that run; yields those that came."""
    told: list[int] = []

    def pass_on(number: int, frame: Any) -> None:
        told.append(number)
        for process in running:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _relay(stream: TextIO | None, out: TextIO, prefix: str) -> None:
    """Copies lines with a prefix, as they come."""
    assert stream is not None
    with stream:
        for line in stream:
            out.write(prefix + line.rstrip("\n") + "\n")
            out.flush()
