import copy

import pytest
import torch

from octvideo.data.preprocessing import Preprocessing
from octvideo.errors import DamagedCheckpointError
from octvideo.models.checkpoint import Trained, load_trained, read_training_checkpoint
from octvideo.training.recognizer import Recognizer

PREPROCESSING = {"clip_frames": 4, "frame_stride": 2, "test_crop_size": 32}


@pytest.fixture(scope="module")
def module():
    torch.manual_seed(0)
    return Recognizer("i3d_r50", alpha=0.25, num_classes=3, width=8, mean=0.4, std=0.2).eval()


@pytest.fixture
def checkpoint(module):
    data = {"labels": ["run", "jump", "sit"], "preprocessing": PREPROCESSING}
    state = {name: value.clone() for name, value in module.state_dict().items()}
    return {"hyper_parameters": dict(module.hparams), "VideoData": data, "state_dict": state}


def opened(checkpoint, tmp_path, **options):
    torch.save(checkpoint, tmp_path / "some.ckpt")
    return load_trained(tmp_path / "some.ckpt", **options)


def test_the_network_gives_the_logits_of_the_module_that_was_trained(module, checkpoint, tmp_path):
    trained = opened(checkpoint, tmp_path)
    clips = torch.randint(0, 256, (2, 3, 4, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(trained.network(trained.normalize(clips)), module(clips))
    assert not trained.network.training
    assert trained.labels == ["run", "jump", "sit"]
    assert trained.preprocessing == Preprocessing(**PREPROCESSING, mean=0.4, std=0.2)
    assert (trained.options["name"], trained.options["alpha"]) == ("i3d_r50", 0.25)


def test_another_alpha_is_that_networks(module, checkpoint, tmp_path):
    trained = opened(checkpoint, tmp_path, alpha=0.5)
    other = Recognizer("i3d_r50", alpha=0.5, num_classes=3, width=8, mean=0.4, std=0.2).eval()
    other.load_state_dict(module.state_dict())
    clips = torch.randint(0, 256, (2, 3, 4, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(trained.network(trained.normalize(clips)), other(clips))
    assert trained.options["alpha"] == 0.5


def test_classes_without_names_have_numbers(checkpoint, tmp_path):
    checkpoint["VideoData"]["labels"] = None
    assert opened(checkpoint, tmp_path).labels == ["class 0", "class 1", "class 2"]


@pytest.mark.parametrize("key", ["hyper_parameters", "VideoData", "state_dict"])
def test_a_file_of_another_kind_is_named(checkpoint, tmp_path, key):
    del checkpoint[key]
    with pytest.raises(ValueError, match=f"some.ckpt: not a checkpoint of train_net.py: it has no '{key}'"):
        opened(checkpoint, tmp_path)


def test_weights_of_another_network_are_refused(checkpoint, tmp_path):
    checkpoint = copy.deepcopy(checkpoint)
    checkpoint["hyper_parameters"]["width"] = 16
    with pytest.raises(ValueError, match="do not fit the i3d_r50 that it describes"):
        opened(checkpoint, tmp_path)


def test_a_torn_or_missing_file_is_named(checkpoint, tmp_path):
    torch.save(checkpoint, tmp_path / "some.ckpt")
    content = (tmp_path / "some.ckpt").read_bytes()
    (tmp_path / "torn.ckpt").write_bytes(content[: len(content) // 2])
    with pytest.raises(DamagedCheckpointError, match=r"torn\.ckpt"):
        load_trained(tmp_path / "torn.ckpt")
    with pytest.raises(FileNotFoundError):
        load_trained(tmp_path / "missing.ckpt")


def test_everything_is_read_once(checkpoint, tmp_path):
    checkpoint |= {"epoch": 3, "global_step": 12}
    torch.save(checkpoint, tmp_path / "some.ckpt")
    found = read_training_checkpoint(tmp_path / "some.ckpt", mmap=True)
    assert found.options == {
        "name": "i3d_r50",
        "alpha": 0.25,
        "num_classes": 3,
        "width": 8,
        "depth": None,
        "frame_ratio": 4,
        "channel_ratio": 8,
        "downsample": "conv",
        "round_to": 1,
        **{"network": None, "skip": None, "output": None, "task": "single", "elastic": None},
    }
    assert found.preprocessing == Preprocessing(**PREPROCESSING, mean=0.4, std=0.2)
    assert (found.labels, found.content["epoch"], found.content["global_step"]) == (["run", "jump", "sit"], 3, 12)
    assert all(torch.equal(tensor, checkpoint["state_dict"][name]) for name, tensor in found.tensors.items())


def test_what_older_checkpoints_do_not_name_has_defaults(checkpoint, tmp_path):
    del checkpoint["VideoData"]
    for key in ("downsample", "round_to"):
        del checkpoint["hyper_parameters"][key]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    found = read_training_checkpoint(tmp_path / "old.ckpt")
    assert (found.options["downsample"], found.options["round_to"]) == ("conv", 1)
    assert found.preprocessing == Preprocessing(mean=0.4, std=0.2)
    assert found.labels is None


def test_a_bare_module_can_be_a_trained_network():
    trained = Trained(torch.nn.Flatten(), {}, ["a"], Preprocessing())
    clips = torch.full((1, 3, 1, 1, 1), 255, dtype=torch.uint8)
    torch.testing.assert_close(trained.normalize(clips), torch.full((1, 3, 1, 1, 1), (1 - 0.45) / 0.225))
