"""Trainings under torchrun on two nodes, of which something is killed, and the example for Kubernetes."""

import os
import subprocess

import pytest
import yaml
from conftest import ROOT, run_processes, run_tool, small
from torch.distributed.elastic.rendezvous.utils import _parse_rendezvous_config
from torch.distributed.run import get_args_parser

from experiments import nodes

OPTIONS = [
    *("--data.batch_size=2", "--data.num_workers=1", "--save_every_n_steps=2", "--model.warmup_epochs=1"),
    *("--trainer.accelerator=cpu", "--trainer.max_epochs=2", "--trainer.limit_val_batches=1"),
]


@pytest.fixture(scope="module")
def whole(motions, built_once):
    """The folder of an undisturbed run of two processes."""

    def train(run):
        ended = run_processes(2, "train_net.py", *small(motions, run), *OPTIONS)
        assert [process.returncode for process in ended] == [0, 0], ended[0].stderr

    return built_once("undisturbed", train)


@pytest.mark.long
@pytest.mark.slow
def test_a_killed_node_is_started_again_and_goes_on_to_the_same_weights(motions, whole, tmp_path):
    """experiments/nodes.py kills single processes too."""
    options = [*small(motions, tmp_path / "run"), *OPTIONS, "--ckpt_path=auto", "--trainer.callbacks+=nodes.Steps"]
    launch = ["--nproc_per_node=1"]
    found = nodes.train(
        tmp_path / "run", options, lambda both: both[1].kill(), launch, True, after=3, limit_seconds=300
    )
    assert found["torchruns started"] == [1, 2]
    assert found["steps repeated"] >= 1
    assert nodes.same_weights(tmp_path / "run", whole)


def test_restarts_of_processes_that_share_a_store_are_refused():
    """Those that torchrun restarts would look for the dead ones."""
    torchrun = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "x"}
    shared = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "3"}
    ended = run_tool("train_net.py", "--cfg=configs/quickstart.yaml", **torchrun, **shared)
    assert ended.returncode == 2
    assert "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun" in ended.stderr


@pytest.mark.parametrize("index", [0, 1])
def test_the_command_of_the_kubernetes_example_is_understood(tmp_path, index):
    service, job = yaml.safe_load_all((ROOT / "tools" / "kubernetes_train.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    given = {variable["name"]: variable["value"] for variable in container["env"]}
    assert int(given["NODES"]) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert int(given["GPUS"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    (tmp_path / "torchrun").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    (tmp_path / "torchrun").chmod(0o755)
    environment = os.environ | given | {"JOB_COMPLETION_INDEX": str(index), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    printed = subprocess.run(container["command"], env=environment, capture_output=True, text=True, check=True).stdout
    launch = get_args_parser().parse_args(printed.splitlines())
    assert (launch.nnodes, launch.nproc_per_node) == (given["NODES"], given["GPUS"])
    assert launch.rdzv_endpoint == f"{job['metadata']['name']}-0.{pod['subdomain']}:29500"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert _parse_rendezvous_config(launch.rdzv_conf)["is_host"] == str(int(index == 0))
    assert launch.training_script == "tools/train_net.py"
    accepted = run_tool("train_net.py", *launch.training_script_args, "--print_config")
    assert accepted.returncode == 0, accepted.stderr
