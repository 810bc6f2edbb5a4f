"""Octaves whose sums, batch norm, residual and activation wait for one pass, and the operators that make them."""

import copy
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, long, settle
from lightning.pytorch import Trainer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from octvideo import Octaves, OctConv2d, OctConv3d, create_model
from octvideo.errors import UserError
from octvideo.layers import finishing, use_fused_passes
from octvideo.layers.pending import Pending
from octvideo.layers.resampling import lay_channels_last
from octvideo.models.cost import count_cost, total
from octvideo.models.recomputation import recompute
from octvideo.training.recognizer import Recognizer


class Operations(TorchDispatchMode):
    """Keeps the names of operations."""

    only_counts = True

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def fused():
    before = use_fused_passes("on")
    yield
    use_fused_passes(before)


def layer(cin=8, cout=8, **options):
    return OctConv3d(cin, cout, 3, padding=1, alpha=0.25, **options).double()


def waiting(x=None):
    return waiting_from(layer(), torch.randn(2, 8, 2, 6, 5).double() if x is None else x)


def waiting_from(convolution, x):
    y = convolution(x)
    assert isinstance(y, Pending)
    assert y._wait is not None
    return y


@pytest.mark.parametrize(
    ("name", "size"),
    [("i3d_r50", (4, 45, 36)), ("slowfast_r50", (8, 32, 32)), ("x3d_xs", (4, 32, 32)), ("r2plus1d_r50", (4, 32, 32))],
)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_networks_are_what_they_are_without(name, size, checkpointed):
    torch.manual_seed(0)
    network = settle(create_model(name, alpha=0.25, width=8, num_classes=5, dropout=0, channels_last=True).double())
    clip, found = torch.randn(2, 3, *size).double(), []
    if checkpointed:
        recompute(network)
    for mode in ("off", "on"):
        use_fused_passes(mode)
        own = copy.deepcopy(network)
        F.cross_entropy(own.train()(clip), torch.tensor([1, 2])).backward()
        gradients = [x.grad for x in own.parameters()]
        with torch.inference_mode():
            scores = own.eval()(clip)
        found.append([scores.clone(), *gradients, *own.buffers()])
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-6, atol=1e-9)


def test_batch_norm_residual_and_activation_are_one_operation():
    convolution, norm = layer(), nn.BatchNorm3d(8).double().eval()
    x = waiting(torch.randn(2, 8, 2, 6, 6).double())
    x.ready(pool=True)
    with torch.no_grad(), Operations() as operations:
        y = F.relu(norm(convolution(x)) + x)
        assert isinstance(y, Pending)
        high, low = y
    assert operations.names.count("octvideo.finish") == 1
    assert operations.names.count("aten.convolution") == 3
    passes_of_their_own = {"aten.native_batch_norm", "aten.relu", "aten.avg_pool2d", "aten.cat", "aten.add"}
    assert not passes_of_their_own & set(operations.names)
    use_fused_passes("off")
    with torch.no_grad():
        wanted = F.relu(norm(convolution(Octaves(*x))) + Octaves(*x))
    torch.testing.assert_close((high, low), tuple(wanted))


def test_what_is_not_waited_for_makes_the_maps():
    y = waiting()
    for own, other in zip(torch.sigmoid(y), (torch.sigmoid(x) for x in y), strict=True):
        torch.testing.assert_close(own, other)
    z = waiting()
    assert (z.shape, z.dim(), z.dtype, z.requires_grad) == ((2, 8, 2, 6, 5), 5, torch.double, True)
    assert z._wait is not None  # to ask is not to read
    assert type(z)(*z) is not z
    assert type(z)(*z).merge().shape == z.shape


def test_functions_in_place_change_the_object_that_waits():
    convolution, x = layer(), torch.randn(2, 8, 2, 6, 5).double()
    y, z = waiting_from(convolution, x), waiting_from(convolution, x)
    assert F.relu(z, inplace=True) is z
    for own, other in zip(z, y, strict=True):
        torch.testing.assert_close(own, other.relu())


def test_nobody_waits_with_maps_that_others_may_write_to():
    convolution, x = layer(), torch.randn(2, 8, 2, 6, 5).double()
    with torch.no_grad():
        wanted = [2 * part for part in waiting_from(convolution, x)]
        y, residual = waiting_from(convolution, x), waiting_from(convolution, x)
        added = y + residual
        assert added._wait is not None
        residual.high.zero_()  # asking for the map makes the sum first
        for own, want in zip(added, wanted, strict=True):
            torch.testing.assert_close(own, want)
        assert not isinstance(waiting_from(convolution, x) + residual, Pending)


def test_pooled_maps_are_forgotten_when_the_map_is_written_to():
    with torch.no_grad():
        x, convolution = waiting(torch.randn(2, 8, 2, 6, 6).double()), layer()
        convolution(x)  # pools x
        F.relu_(x.mul_(-1))
        own = convolution(x).merge()
        use_fused_passes("off")
        torch.testing.assert_close(own, convolution(Octaves(*x)).merge())


def test_the_mode_of_the_convolution_decides_about_gradients():
    y = waiting()
    with torch.no_grad():
        high, _ = y
    assert high.requires_grad
    with torch.no_grad():
        y = waiting()
    assert not y.high.requires_grad
    y = waiting()
    with torch.inference_mode():
        high, _ = y
    assert not high.is_inference()


def test_second_derivatives_and_batched_gradients():
    torch.manual_seed(0)
    convolution, norm = layer(), nn.BatchNorm3d(8).double()
    x = torch.randn(2, 8, 1, 4, 4).double().requires_grad_()

    def function(x):
        return tuple(F.silu(norm(convolution(x))))

    assert torch.autograd.gradcheck(function, (x,), check_batched_grad=True, atol=1e-4)
    assert torch.autograd.gradgradcheck(function, (x,), atol=1e-3)


@pytest.mark.parametrize("factor", [1, 2])
def test_two_dimensions_strides_and_bf16(factor):
    torch.manual_seed(0)
    first, second = (OctConv2d(8, 8, 3, stride=stride, padding=1, alpha=0.5) for stride in (1, factor))
    x, found = torch.randn(2, 8, 13, 10), []
    for mode in ("off", "on"):
        use_fused_passes(mode)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(second(F.relu(first(x))).merge().float())
    assert ((found[0] - found[1]).norm() / found[0].norm()) < 1e-2


def test_fused_passes_move_fewer_bytes_in_fewer_kernels():
    costs = {}
    for alpha, mode in ((0, "off"), (0.25, "on")):
        use_fused_passes(mode)
        network = create_model("i3d_r50", alpha=alpha, channels_last=True)
        for train in (False, True):
            costs[alpha, mode, train] = total(count_cost(network, batch=8, dtype=torch.bfloat16, train=train))
    for train, bytes_at_most, kernels_at_most in ((False, 0.75, 1.4), (True, 0.95, 1.9)):
        vanilla, own = costs[0, "off", train], costs[0.25, "on", train]
        assert own.bytes_moved < bytes_at_most * vanilla.bytes_moved
        assert own.kernels < kernels_at_most * vanilla.kernels


def test_a_recipe_switches_them_on_for_gpus():
    use_fused_passes("off")
    recognizer = Recognizer("i3d_r50", width=8, fused_passes=True)
    recognizer.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    recognizer.configure_model()
    assert use_fused_passes("off") == "auto"
    assert not isinstance(layer()(torch.randn(1, 8, 1, 4, 4).double()), Pending)


def test_unknown_modes_are_refused():
    with pytest.raises(UserError, match="fused passes are one of auto, on, off, got 'yes'"):
        use_fused_passes("yes")
    assert use_fused_passes("off") == "on"


@pytest.mark.parametrize(("dtype", "count"), [long("fp32", 5), ("bf16", 2)])
def test_kernels_equal_the_reference_in_tritons_interpreter(dtype, count):
    pytest.importorskip("triton")
    options = ("--device", "cpu", "--dtype", dtype, "--cases", str(count))
    command = (sys.executable, ROOT / "experiments" / "passes.py", *options)
    process = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "gradients" in process.stdout


def test_kernels_compile_for_a_gpu():
    """Without one: Triton brings its own assembler."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    from octvideo.layers import kernels

    sizes = {"UNIT": 8, "FH": 2, "FW": 2, "ADD": 1, "LOW_ADD": True, "BLOCK_C": 64, "BLOCK_P": 16}
    norm = {"NORM": True, "WEIGHT": True, "BIAS": True}
    given = {"GRAD_HIGH": True, "GRAD_LOW": True, "GRAD_POOLED": True}
    cases = {
        kernels._finish_kernel: sizes | norm | {"PLUS": True, "ACT": 1, "POOL": True},
        kernels._statistics_kernel: sizes,
        kernels._combine_kernel: {"RUNNING": True, "BLOCK_C": 16, "BLOCK_R": 128},
        kernels._reduce_kernel: sizes | norm | given | {"PLUS": True, "ACT": 3},
        kernels._apply_kernel: sizes | norm | given | {"OF_BATCH": True, "ACT": 2, "JOINED": True},
    }
    numbers = {"eps", "momentum", "inverse_high", "inverse_low"}
    wide = {"mean", "var", "weight", "bias", "counts", "means", "squares", "running_mean", "running_var", "sums"}
    for kernel, constants in cases.items():
        kinds = {}
        for name in kernel.arg_names:
            kind = "fp32" if name in numbers else "i32" if name in kernels._SIZES else "*bf16"
            kinds[name] = "constexpr" if name in constants else "*fp32" if name in wide else kind
        source = triton.compiler.ASTSource(fn=kernel, signature=kinds, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
        assert "st.global" in compiled.asm["ptx"]


def test_the_operators_pass_torchs_own_checks():
    sizes = ((3, 4), (2, 2), (5, 2))
    high, low, add = (lay_channels_last(torch.randn(1, channels, 2, n, n)) for channels, n in sizes)
    weight, bias = torch.ones(5), torch.zeros(5)
    mean, var = finishing.statistics(high, add, low, None, None, None, 0.1)
    tensors = [x.requires_grad_() for x in (high, add, low)]
    arguments = (*tensors, None, mean, var, weight, bias, 1e-5, None, None, True, "relu", True)
    torch.library.opcheck(finishing.finish, arguments)
