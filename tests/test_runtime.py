"""What PyTorch does to a network works on an octave one: compile, export, ONNX, checkpoints, precision, processes."""

import copy
import pickle

import numpy as np
import onnxruntime
import pytest
import torch
import torch.distributed as dist
from conftest import in_two_processes, long, settle
from pytorchvideo.models import resnet, slowfast, x3d
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from octvideo import Octaves, OctConv3d, create_model, octavize
from octvideo.models.zoo import NonLocalBlock

NAMES = ["i3d_r50", "slowfast_r50"]
ONE_STAGE = (0, 0.25, 0, 0)  # octave, with what leads into it and out of it: of more, compilers take minutes
SIZES = {"even": (48, 64), "odd": (40, 56)}  # maps of 10 x 14, 5 x 7, 3 x 4, 2 x 2


def network_and_clip(name, size=SIZES["odd"], batch=2, frames=4, alpha=0.25):
    torch.manual_seed(0)
    network = settle(create_model(name, alpha=alpha, width=16, num_classes=5, dropout=0))
    return network, torch.randn(batch, 3, frames, *size)


def gradients(network, loss):
    network.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in network.named_parameters()}


@pytest.fixture(autouse=True)
def every_test_compiles_anew():
    """Else another size would be compiled for any size, which takes minutes."""
    torch._dynamo.reset()


@pytest.fixture
def few_blocks(monkeypatch):
    """Compilers take minutes for whole networks: the first block of each stage, with its shortcut, and another in res3.

    Stages differ in numbers of channels alone, and the maps of res3 are odd where any are.
    """
    for module in (resnet, slowfast):
        monkeypatch.setitem(module._MODEL_STAGE_DEPTH, 50, (1, 2, 1, 1))
    monkeypatch.setattr(x3d, "round_repeats", lambda repeats, factor: 2 if repeats == 2 else 1)  # they are 1, 2, 5, 3


ANY_BATCH = {"x": {0: torch.export.Dim("batch", min=1, max=64)}}


def exported(built_once, name, size, alpha, strict):
    """A network, the size of its clips, and the file of its program for any batch."""
    network, clip = network_and_clip(name, SIZES[size], alpha=alpha)

    def build(folder):
        program = torch.export.export(network, (clip,), dynamic_shapes=ANY_BATCH, strict=strict)
        torch.export.save(program, folder / "network.pt2")

    folder = built_once(f"{name}-{size}-{alpha}-{strict}", build)
    return network, clip.shape[1:], folder / "network.pt2"


@pytest.mark.slow
@pytest.mark.usefixtures("few_blocks")
@pytest.mark.parametrize(("name", "size"), [("i3d_r50", "odd"), long("x3d_s", "even")])
def test_compiles_without_graph_breaks_in_evaluation(name, size):
    network, clip = network_and_clip(name, SIZES[size])
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(clip), network(clip))


@pytest.mark.slow
@pytest.mark.usefixtures("few_blocks")
@pytest.mark.parametrize(
    ("name", "alpha"), [("i3d_r50", 0.25), long("slowfast_r50", ONE_STAGE), long("x3d_s", ONE_STAGE)]
)
def test_compiles_without_graph_breaks_in_training(name, alpha):
    network, clip = network_and_clip(name, SIZES["even"], alpha=alpha)
    network.train()
    other = copy.deepcopy(network)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    wanted = gradients(network, network(clip).square().sum())
    for parameter_name, gradient in gradients(other, compiled(clip).square().sum()).items():
        torch.testing.assert_close(gradient, wanted[parameter_name], rtol=1e-3, atol=1e-3)
    for buffer, wanted_buffer in zip(other.buffers(), network.buffers(), strict=True):
        torch.testing.assert_close(buffer, wanted_buffer)


@pytest.mark.slow
@pytest.mark.usefixtures("few_blocks")
@pytest.mark.parametrize(
    ("name", "size", "alpha", "strict"),
    [
        long("i3d_r50", "odd", 0.25, True),  # dynamo's trace
        long("slowfast_r50", "even", ONE_STAGE, False),
    ],
)
def test_exports_for_any_batch(name, size, alpha, strict, built_once):
    network, clip_size, path = exported(built_once, name, size, alpha, strict)
    loaded = torch.export.load(path).module()
    for batch in (1, 2, 5):
        clips = torch.randn(batch, *clip_size)
        torch.testing.assert_close(loaded(clips), network(clips))


@pytest.mark.slow
@pytest.mark.usefixtures("few_blocks")
@pytest.mark.parametrize(
    ("name", "size", "alpha"),
    [("i3d_r50", "odd", 0.25), long("slowfast_r50", "even", ONE_STAGE), long("x3d_s", "odd", ONE_STAGE)],
)
def test_runs_in_onnxruntime_for_any_batch(name, size, alpha, tmp_path, built_once):
    if name == "x3d_s":
        network, clip = network_and_clip(name, SIZES[size], alpha=alpha)
        clip_size, given = clip.shape[1:], {"model": network, "args": (clip,), "dynamic_shapes": ANY_BATCH}
    else:  # as octvideo export does
        network, clip_size, path = exported(built_once, name, size, alpha, strict=name == "i3d_r50")
        given = {"model": torch.export.load(path)}
    torch.onnx.export(**given, dynamo=True, verbose=False).save(tmp_path / "network.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "network.onnx")
    for batch in (1, 3):
        clips = torch.randn(batch, *clip_size)
        (logits,) = session.run(None, {session.get_inputs()[0].name: clips.numpy()})
        np.testing.assert_allclose(logits, network(clips).detach().numpy(), rtol=1e-3, atol=1e-4)


def test_a_non_local_block_runs_in_onnxruntime_for_any_batch(tmp_path):
    torch.manual_seed(0)
    block = settle(octavize(NonLocalBlock(8), {"conv": 0.25}))
    x = torch.randn(2, 8, 2, 5, 6)
    program = torch.onnx.export(block.eval(), (x,), dynamo=True, dynamic_shapes=ANY_BATCH, verbose=False)
    program.save(tmp_path / "block.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "block.onnx")
    for batch in (1, 3):
        x = torch.randn(batch, *x.shape[1:])
        (out,) = session.run(None, {"x": x.numpy()})
        np.testing.assert_allclose(out, block(x).detach().numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("few_blocks")
@pytest.mark.parametrize("name", NAMES)
def test_traces(name):
    network, clip = network_and_clip(name)
    with torch.no_grad():
        traced = torch.jit.trace(network, clip, check_trace=False)
        other = torch.randn_like(clip)
        torch.testing.assert_close(traced(other), network(other))


class Checkpointed(nn.Module):
    """A network whose blocks are computed again in the backward pass."""

    def __init__(self, network, use_reentrant):
        super().__init__()
        self.network = network
        self.use_reentrant = use_reentrant

    def forward(self, x):
        if hasattr(self.network, "frame_ratio"):
            x = [x[:, :, :: self.network.frame_ratio].clone(), x.clone()]
        for block in self.network.blocks:
            x = checkpoint(block, x, use_reentrant=self.use_reentrant)
        return x


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_gives_the_same_gradients(name):
    network, clip = network_and_clip(name)
    if hasattr(network, "frame_ratio"):
        pathways = [clip[:, :, ::4].clone(), clip.clone()]
        for block in network.blocks:
            pathways = block(pathways)
        logits = pathways
    else:
        logits = network(clip)
    wanted = gradients(network, logits.square().sum())
    found = gradients(network, Checkpointed(network, use_reentrant=False)(clip).square().sum())
    for parameter_name in wanted:
        torch.testing.assert_close(found[parameter_name], wanted[parameter_name])


@pytest.mark.parametrize("name", NAMES)
def test_reentrant_checkpointing_is_refused(name):
    network, clip = network_and_clip(name)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        Checkpointed(network, use_reentrant=True)(clip.requires_grad_())


def test_reentrant_checkpointing_from_a_tensor_to_a_tensor_is_right():
    torch.manual_seed(0)
    network = nn.Sequential(OctConv3d(3, 8, 1), nn.ReLU(), OctConv3d(8, 4, 1, alpha=0))
    clip = torch.randn(2, 3, 2, 6, 6, requires_grad=True)
    wanted = gradients(network, network(clip).square().sum())
    found = gradients(network, checkpoint(network, clip, use_reentrant=True).square().sum())
    for parameter_name in wanted:
        assert torch.equal(found[parameter_name], wanted[parameter_name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_autocast(name, dtype):
    # In bfloat16 oneDNN's gradient of a weight that is longer than the clip has frames reads memory that nobody wrote,
    # in any nn.Conv3d: 16 frames are the fewest that SlowFast's slow pathway needs for its kernels of 3.
    network, clip = network_and_clip(name, frames=16)
    wanted = network(clip)
    kinds = set()
    for module in network.modules():
        if isinstance(module, OctConv3d):
            module.register_forward_hook(lambda module, args, output: kinds.add(output.dtype))
    with torch.autocast("cpu", dtype):
        logits = network(clip)
    assert kinds == {dtype}
    scale = wanted.abs().max()
    torch.testing.assert_close(logits.float() / scale, wanted / scale, rtol=0, atol=0.05)
    for name_, gradient in gradients(network, logits.float().square().sum()).items():
        assert gradient.isfinite().all(), name_


@pytest.mark.parametrize("name", NAMES)
def test_channels_last_goes_through_the_whole_network(name):
    network, clip = network_and_clip(name)
    wanted = network(clip)
    network = network.to(memory_format=torch.channels_last_3d)
    lost = []

    def look(module, args, output):
        for map_ in output if isinstance(output, tuple | list) else [output]:
            for x in map_ if isinstance(map_, Octaves) else [map_]:
                several_cells = x.dim() == 5 and x.shape[2:].numel() > 1
                if several_cells and not x.is_contiguous(memory_format=torch.channels_last_3d):
                    lost.append(type(module).__name__)

    for module in network.modules():
        module.register_forward_hook(look)
    logits = network(clip.contiguous(memory_format=torch.channels_last_3d))
    assert not lost
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_pickles_are_equal(name):
    network, clip = network_and_clip(name)
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(other(clip), network(clip))
        assert str(other.octave_report) == str(network.octave_report)


def compare_data_parallel(rank, name):
    """Without batch statistics, two halves of a batch give the gradients of the whole."""
    network, clip = network_and_clip(name, batch=4)
    wanted = gradients(network, network(clip).square().mean())
    parallel = DistributedDataParallel(network)
    network.zero_grad()
    parallel(clip[2 * rank : 2 * rank + 2]).square().mean().backward()
    for parameter_name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[parameter_name], rtol=1e-4, atol=1e-5)


def compare_sync_batch_norm(rank, name):
    """With SyncBatchNorm in float64: logits, gradients and running statistics of the whole batch."""
    network, clip = network_and_clip(name, batch=4)
    network, clip = network.double().train(), clip.double()
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(network))
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in synced.modules()) > 40
    here = slice(2 * rank, 2 * rank + 2)
    logits = network(clip)
    wanted = gradients(network, logits.square().mean())
    found = synced(clip[here])
    torch.testing.assert_close(found, logits[here], rtol=1e-6, atol=1e-8)
    found.square().mean().backward()
    for (parameter_name, gradient), parameter in zip(wanted.items(), synced.parameters(), strict=True):
        dist.all_reduce(parameter.grad)  # as DistributedDataParallel does, which refuses SyncBatchNorm on CPUs
        torch.testing.assert_close(parameter.grad / 2, gradient, rtol=1e-6, atol=1e-6, msg=parameter_name)
    for (buffer_name, buffer), synced_buffer in zip(network.named_buffers(), synced.buffers(), strict=True):
        torch.testing.assert_close(synced_buffer, buffer, rtol=1e-6, atol=1e-8, msg=buffer_name)


def compare_sync_batch_norm_options(rank, name):
    """Cumulative statistics, none, no scale, and half precision, on octave features of two pieces."""
    torch.manual_seed(0)
    x = Octaves(torch.randn(4, 12, 4, 6), torch.randn(4, 4, 2, 3), ((6, 2), (6, 2)))
    here = slice(2 * rank, 2 * rank + 2)
    for options in ({"momentum": None}, {"track_running_stats": False}, {"affine": False}):
        norm, synced = nn.BatchNorm2d(16, **options), nn.SyncBatchNorm(16, **options)
        for _ in range(2):
            torch.testing.assert_close(synced(x[here]).merge(), norm(x)[here].merge())
        torch.testing.assert_close(synced.state_dict(), norm.state_dict())
    half = nn.SyncBatchNorm(16)(x.bfloat16()[here])
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.merge().float(), nn.BatchNorm2d(16)(x)[here].merge(), rtol=0.02, atol=0.02)


def compare_fully_sharded(rank, name):
    """FSDP2 on every block: logits and gradients of the whole network."""
    network, clip = network_and_clip(name, batch=4)
    wanted_logits = network(clip)
    wanted = gradients(network, wanted_logits.square().mean())
    sharded = copy.deepcopy(network)
    mesh = dist.init_device_mesh("cpu", (2,))
    for block in sharded.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    here = slice(2 * rank, 2 * rank + 2)
    logits = sharded(clip[here])
    torch.testing.assert_close(logits, wanted_logits[here])
    logits.square().mean().backward()
    for parameter_name, parameter in sharded.named_parameters():
        gradient = parameter.grad.full_tensor()
        torch.testing.assert_close(gradient, wanted[parameter_name], rtol=1e-4, atol=1e-5, msg=parameter_name)


def test_sync_batch_norm_takes_the_options_of_batch_norm(tmp_path):
    in_two_processes(compare_sync_batch_norm_options, "", folder=tmp_path)


@pytest.mark.parametrize("compare", [compare_data_parallel, compare_sync_batch_norm, compare_fully_sharded])
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_equal_one_on_the_whole_batch(name, compare, tmp_path):
    in_two_processes(compare, name, folder=tmp_path)
