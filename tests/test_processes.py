"""Several processes: the same gradients, the same weights, and every video counted once."""

import json

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import FORKS, free_port, run_processes, run_tool, settle, small
from torch.nn.parallel import DistributedDataParallel

from octvideo import create_model
from octvideo.data.motions import make_data_set
from octvideo.layers.normalization import normalize
from octvideo.training.checkpoints import _order_buckets


def gradients_of_share(rank, processes, port, folder):
    """One process's part of a training step of an octave network in float64, with synchronised batch norm."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=processes)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = settle(create_model("i3d_r50", alpha=0.25, width=8, num_classes=5, dropout=0)).double().train()
    clips, labels = torch.randn(4, 3, 4, 40, 56, dtype=torch.float64), torch.arange(4)
    normalize(network, "sync")
    model = DistributedDataParallel(network)
    part = slice(rank * 4 // processes, (rank + 1) * 4 // processes)
    torch.nn.functional.cross_entropy(model(clips[part]), labels[part]).backward()
    if rank == 0:
        buffers = dict(network.named_buffers())
        torch.save({name: x.grad for name, x in network.named_parameters()} | buffers, folder / f"{processes}.pt")
    dist.barrier()


def test_gradients_of_two_processes_are_those_of_one_on_the_joined_batch(tmp_path):
    for count in (1, 2):
        port = free_port()
        processes = [
            FORKS.Process(target=gradients_of_share, args=(rank, count, port, tmp_path)) for rank in range(count)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            assert process.exitcode == 0
    one, two = (torch.load(tmp_path / f"{count}.pt") for count in (1, 2))
    assert one.keys() == two.keys()
    assert len(one) > 300
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-6, atol=1e-9)


def weights_of_whole_and_resumed(rank, port, folder, ordered):
    """Two steps of a process, and the second one alone from the weights after the first."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=4)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(9)))
    after_first = {}
    clips, weights = torch.randn(2, 4, 8, 64), []
    for steps in ((0, 1), (1,)):
        if steps == (1,):
            network.load_state_dict(after_first)
        model = DistributedDataParallel(network)
        if ordered:
            _order_buckets(model)
        for step in steps:
            model(clips[step, rank]).square().sum().backward()
            with torch.no_grad():
                for x in network.parameters():
                    x -= 0.1 * x.grad
                    x.grad = None
            if step == 0:
                after_first = {name: value.clone() for name, value in network.state_dict().items()}
        weights.append({name: value.clone() for name, value in network.state_dict().items()})
    torch.save(weights, folder / f"{rank}.pt")
    dist.barrier()


@pytest.mark.parametrize("ordered", [False, True])
def test_the_first_step_of_a_resumed_process_sums_as_the_same_step_of_a_whole_run(tmp_path, ordered):
    """DDP alone does not: this fails when it does, and ordering is needless then."""
    port = free_port()
    processes = [
        FORKS.Process(target=weights_of_whole_and_resumed, args=(rank, port, tmp_path, ordered)) for rank in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    whole, resumed = torch.load(tmp_path / "0.pt")
    assert all(torch.equal(resumed[name], value) for name, value in whole.items()) == ordered


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A motions data set with 61 validation videos."""
    folder = tmp_path_factory.mktemp("many")
    make_data_set(folder, 8, 61)
    return folder


@pytest.mark.long
def test_any_number_of_processes_counts_each_of_61_videos_once(many, trained, tmp_path):
    found = {}
    for processes in (1, 2, 3):
        ended = run_processes(
            processes,
            "test_net.py",
            *small(many, trained),
            f"--ckpt={trained / 'checkpoints' / 'last.ckpt'}",
            f"--output={tmp_path / str(processes)}",
            "--trainer.accelerator=cpu",
        )
        assert [process.returncode for process in ended] == [0] * processes, ended[0].stderr
        assert "61 videos tested, 0 bad" in ended[0].stdout
        found[processes] = json.loads((tmp_path / str(processes) / "predictions.json").read_text())
    for processes in (2, 3):
        assert len(found[processes]["videos"]) == len({video["path"] for video in found[processes]["videos"]}) == 61
        for one, other in zip(found[1]["videos"], found[processes]["videos"], strict=True):
            assert (one["path"], one["label"]) == (other["path"], other["label"])
            np.testing.assert_allclose(other["scores"], one["scores"], rtol=0, atol=1e-6)
        for accuracy in ("top1", "top5", "clip_top1", "clip_top5"):
            assert found[processes][accuracy] == pytest.approx(found[1][accuracy], abs=1e-6)


def differs(found, wanted):
    """How far two tensors are apart, relative to their size: rounding of a few steps is 1e-4, others' momenta are 1."""
    found, wanted = found.double(), wanted.double()
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-3))


@pytest.mark.long
def test_sharded_training_is_replicated_training(motions, tmp_path):
    """FSDP2 and DDP end with the same weights and momenta, go on from each other's checkpoints, and are tested."""
    options = ["--trainer.accelerator=cpu", "--trainer.gradient_clip_val=1", "--data.num_workers=0", "--precise_bn=1"]
    for first, then in (("ddp", "fsdp"), ("fsdp", "ddp")):
        run = [*small(motions, tmp_path / first), *options]
        ended = run_processes(2, "train_net.py", *run, f"--trainer.strategy={first}", "--trainer.max_epochs=1")
        assert [process.returncode for process in ended] == [0, 0], ended[0].stderr
        on = [f"--trainer.strategy={then}", "--trainer.max_epochs=2", "--ckpt_path=last"]
        ended = run_processes(2, "train_net.py", *run, *on)
        assert [process.returncode for process in ended] == [0, 0], ended[0].stderr
    one, two = (
        torch.load(tmp_path / strategy / "checkpoints" / "step_00000004.ckpt", weights_only=True)
        for strategy in ("ddp", "fsdp")
    )
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for name, value in one["state_dict"].items():
        assert differs(two["state_dict"][name], value) < 0.01, name
    a, b = (state["optimizer_states"][0] for state in (one, two))
    assert [group["params"] for group in a["param_groups"]] == [group["params"] for group in b["param_groups"]]
    assert len(a["state"]) == len(b["state"]) > 100
    for number, state in a["state"].items():
        assert differs(b["state"][number]["momentum_buffer"], state["momentum_buffer"]) < 0.01, number
    checkpoint = tmp_path / "fsdp" / "checkpoints" / "best.ckpt"
    kind = "--trainer.strategy=fsdp"
    tested = run_tool("test_net.py", *small(motions, tmp_path), kind, f"--ckpt={checkpoint}", f"--output={tmp_path}")
    assert tested.returncode == 0, tested.stderr


def test_averaged_weights_cannot_be_sharded():
    ended = run_tool("train_net.py", "--cfg=configs/quickstart.yaml", "--ema_decay=.9", "--trainer.strategy=fsdp")
    assert ended.returncode == 2
    assert "ema_decay needs whole weights in every process" in ended.stderr
