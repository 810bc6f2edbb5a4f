import copy
import pickle

import pytest
import torch
from pytorchvideo.models.resnet import ResBlock
from torch import nn

from octvideo.layers.normalization import normalize
from octvideo.layers.octaves import Octaves
from octvideo.models.octavize import octavize
from octvideo.models.recomputation import recompute
from octvideo.models.zoo import NonLocalResBlock, create_model

CLIPS = torch.randn(4, 3, 2, 32, 32, generator=torch.Generator().manual_seed(0))


def small(name="i3d_r50", alpha=0.0, **options):
    """One block a stage, whose every batch norm lets the block do something."""
    torch.manual_seed(1)
    network = create_model(name, alpha=alpha, num_classes=5, width=8, **options)
    for module in network.modules():
        if isinstance(module, nn.ModuleList) and all(isinstance(block, ResBlock) for block in module):
            del module[2 if "nonlocal" in name else 1 :]
        if isinstance(module, nn.BatchNorm3d):
            nn.init.uniform_(module.weight, 0.5, 1)
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.3)
    return network.train()


def train(network, clips=CLIPS):
    """Two steps of gradients with dropout; all that they leave behind."""
    torch.manual_seed(2)
    for _ in range(2):
        network(clips).square().mean().backward()
    gradients = {f"gradient of {name}": parameter.grad for name, parameter in network.named_parameters()}
    return {**gradients, **{name: buffer.clone() for name, buffer in network.named_buffers()}}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert torch.equal(found[name], wanted[name]), name


@pytest.mark.parametrize("kind", ["batch", "sync", "sub"])
@pytest.mark.parametrize("alpha", [0.0, 0.25])
def test_gradients_and_statistics_are_bitwise_those_without(alpha, kind):
    network = normalize(small(alpha=alpha), kind, splits=2 if kind == "sub" else 1)
    again = copy.deepcopy(network)
    assert recompute(again) == 4
    assert_same(train(again), train(network))


@pytest.mark.parametrize(("name", "blocks"), [("slowfast_r50", 8), ("x3d_xs", 4), ("i3d_r50_nonlocal", 8)])
def test_every_family_trains_the_same(name, blocks):
    network = small(name, (0.25, 0.25, 0.25, 0.25), **({"channel_ratio": 2} if name == "slowfast_r50" else {}))
    clips = CLIPS.repeat(1, 1, 2, 1, 1)
    again = copy.deepcopy(network)
    assert recompute(again) == blocks
    assert_same(train(again, clips), train(network, clips))


def test_dropout_inside_a_block_drops_the_same_cells_again():
    network = small(dropout=0.5)
    for module in network.modules():
        if isinstance(module, ResBlock):
            module.branch2.act_a = nn.Dropout(0.5)
    again = copy.deepcopy(network)
    recompute(again)
    assert_same(train(again), train(network))


def kept(network, clips):
    """Bytes that a forward pass keeps for backward: of saved tensors and of the recomputed blocks' inputs."""
    tensors = []

    def pack(tensor):
        tensors.append(tensor)
        return tensor

    def keep_input(module, inputs):
        tensors.extend(inputs[0] if isinstance(inputs[0], Octaves) else inputs)

    hooks = [
        module.register_forward_pre_hook(keep_input)
        for module in network.modules()
        if type(module).__name__.startswith("Recomputed")
    ]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network(clips)
    for hook in hooks:
        hook.remove()
    own = {tensor.data_ptr() for tensor in (*network.parameters(), *network.buffers())}
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(size for pointer, size in storages.items() if pointer not in own)


@pytest.mark.parametrize("alpha", [0.0, 0.25])
def test_blocks_keep_only_their_input(alpha):
    blocks = create_model("i3d_r50", alpha=alpha, width=8).blocks[1].res_blocks
    x = torch.randn(2, 8, 2, 16, 16, requires_grad=True)
    everything = kept(blocks[0].train(), x)
    network = nn.Sequential(blocks[0])
    assert recompute(network) == 1
    assert kept(network, x) == x.nbytes
    assert everything > 10 * x.nbytes


def test_nothing_is_checkpointed_in_evaluation_or_without_gradients(monkeypatch):
    network = small()
    recompute(network)
    monkeypatch.setattr("octvideo.models.recomputation.checkpoint", None)
    with torch.no_grad():
        assert network(CLIPS).shape == (4, 5)
    assert network.eval()(CLIPS).requires_grad
    with pytest.raises(TypeError, match="not callable"):
        network.train()(CLIPS)


def test_names_classes_copies_and_pickles_stay():
    network = small("i3d_r50_nonlocal", 0.25)
    again = copy.deepcopy(network)
    assert recompute(again) == recompute(again) == 8  # also when called twice
    assert [name for name, _ in again.named_modules()] == [name for name, _ in network.named_modules()]
    assert list(again.state_dict()) == list(network.state_dict())
    assert isinstance(again.blocks[3].res_blocks[1], NonLocalResBlock)
    wanted = train(network)
    assert_same(train(copy.deepcopy(again)), wanted)
    assert_same(train(pickle.loads(pickle.dumps(again))), wanted)


@pytest.mark.long
def test_a_compiled_network_trains_as_one_that_is_not():
    network = nn.Sequential(small(alpha=0.25).blocks[1].res_blocks[0])
    x = torch.randn(2, 8, 2, 8, 8)
    again = copy.deepcopy(network)
    recompute(again)
    again.compile(backend="aot_eager")

    def steps(model):
        for _ in range(2):
            y = model(x)
            (y.high.square().mean() + y.low.square().mean()).backward()
        return {**dict(model.named_buffers()), **{name: p.grad for name, p in model.named_parameters()}}

    torch.testing.assert_close(steps(again), steps(network))


def test_a_failing_recomputation_leaves_the_buffers_in_place():
    network = small()
    recompute(network)
    buffers = dict(network.named_buffers())
    loss = network(CLIPS).sum()

    def fail(module, inputs):
        raise KeyError("not again")

    network.blocks[1].res_blocks[0].branch2.norm_b.register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="not again"):
        loss.backward()
    assert all(buffer is buffers[name] for name, buffer in network.named_buffers())


def test_a_network_without_residual_blocks_is_an_error():
    with pytest.raises(ValueError, match="Sequential has no residual blocks"):
        recompute(nn.Sequential(octavize(nn.Conv3d(4, 4, 1), {"": 0.5})))
