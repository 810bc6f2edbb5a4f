"""The Slurm script, with stand-ins for Slurm's own commands."""

import os
import signal
import subprocess

import pytest
from conftest import ROOT

SRUN = """#!/bin/bash
trap 'echo saved; exit 75' TERM
echo "srun $*" >> "$CALLS.srun"
echo ready
[ "$ENDS" = now ] && exit "$CODE"
while :; do sleep 0.02; done
"""
SCANCEL = """#!/bin/bash
echo "scancel $*" >> "$CALLS"
pkill -TERM -f "$CALLS_FOLDER/srun"
"""
SCONTROL = """#!/bin/bash
echo "scontrol $*" >> "$CALLS"
"""


@pytest.fixture
def slurm(tmp_path):
    """The environment of a job, whose calls of Slurm go to a file."""
    for name, code in (("srun", SRUN), ("scancel", SCANCEL), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(code)
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    calls = {"CALLS": str(tmp_path / "calls"), "CALLS_FOLDER": str(tmp_path)}
    return {**os.environ, **calls, "PATH": path, "SLURM_JOB_ID": "17", "PYTHON": "python"}


def start(slurm, **environment):
    command = ["bash", str(ROOT / "tools" / "slurm_train.sbatch"), "--cfg", "configs/oct_i3d.yaml"]
    return subprocess.Popen(command, env=slurm | environment, stdout=subprocess.PIPE, text=True, cwd=ROOT)


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (2, False), (75, True)])
def test_a_job_that_saved_and_left_is_requeued_and_no_other(slurm, tmp_path, code, requeued):
    job = start(slurm, ENDS="now", CODE=str(code))
    job.communicate()
    assert job.returncode == code
    options = "--kill-on-bad-exit=0 --wait=60 python tools/train_net.py --cfg configs/oct_i3d.yaml --ckpt_path auto"
    assert (tmp_path / "calls.srun").read_text() == f"srun {options}\n"
    calls = (tmp_path / "calls").read_text() if (tmp_path / "calls").exists() else ""
    assert calls == ("scontrol requeue 17\n" if requeued else "")


def test_a_container_runs_the_same_command(slurm, tmp_path):
    start(slurm, ENDS="now", CODE="0", CONTAINER="octvideo.sif").communicate()
    in_it = f"apptainer exec --nv --bind {ROOT} --pwd {ROOT} octvideo.sif python tools/train_net.py"
    line = (tmp_path / "calls.srun").read_text()
    assert line == f"srun --kill-on-bad-exit=0 --wait=60 {in_it} --cfg configs/oct_i3d.yaml --ckpt_path auto\n"


def test_a_killed_process_is_started_again_in_the_same_job_but_not_for_ever(slurm, tmp_path):
    job = start(slurm, ENDS="now", CODE="137")
    output, _ = job.communicate()
    assert job.returncode == 137
    assert output.count("a process died (exit code 137); starting again from the newest checkpoint") == 3
    assert len((tmp_path / "calls.srun").read_text().splitlines()) == 4
    assert not (tmp_path / "calls").exists()


def test_a_signal_to_the_job_reaches_its_processes_which_save_before_it_is_requeued(slurm, tmp_path):
    job = start(slurm, ENDS="later")
    assert job.stdout.readline() == "ready\n"
    job.send_signal(signal.SIGTERM)
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 75
    assert output.splitlines() == ["saved", "saved; requeueing job 17"]
    assert (tmp_path / "calls").read_text() == "scancel --signal=TERM 17\nscontrol requeue 17\n"
