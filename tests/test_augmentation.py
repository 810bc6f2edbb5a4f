"""Batch augmentation: the same for all frames of a clip, decided by seeds, and by hand where there is a formula."""

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from torchvision.transforms import v2

from octvideo.data.augmentation import GREY, BatchAugmentation

ALL = {
    "crop_size": 24,
    "mirror_probability": 0.5,
    "rand_augment_layers": 3,
    "erase_probability": 0.5,
    "mixup_alpha": 1.0,
    "cutmix_alpha": 1.0,
    "num_classes": 5,
}
EACH = {name: value for name, value in ALL.items() if not name.endswith("alpha")}


def noise(videos=3, views=2, frames=4, height=33, width=47, seed=0):
    """Random clips (B, V, 3, T, H, W) of odd sizes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (videos, views, 3, frames, height, width), dtype=torch.uint8, generator=generator)


def levels(*greys, views=1, size=8):
    """Clips of one grey level each."""
    return torch.tensor(greys, dtype=torch.uint8)[:, None, None, None, None, None].repeat(1, views, 3, 2, size, size)


def seeds(videos, epoch=0):
    return [(7, epoch, position) for position in range(videos)]


def test_without_options_clips_and_labels_come_back_as_they_are():
    clips, labels = noise(), torch.tensor([0, 1, 2])
    out, out_labels = BatchAugmentation()(clips, labels, seeds(3))
    assert out is clips
    assert out_labels is labels


@pytest.mark.parametrize("options", [EACH, ALL])
def test_given_clips_and_labels_stay_unchanged(options):
    clips, labels = noise(), torch.tensor([0, 1, 2])
    BatchAugmentation(**options)(clips, labels, seeds(3))
    assert torch.equal(clips, noise())
    assert labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "options",
    [
        {"crop_size": 24},
        {"mirror_probability": 0.5},
        {"rand_augment_layers": 2},
        {"erase_probability": 1.0},
        {"mixup_alpha": 1.0, "num_classes": 5},
        {"cutmix_alpha": 1.0, "num_classes": 5},
        ALL,
    ],
)
def test_a_clip_of_equal_frames_stays_one(options):
    clips = noise(videos=12, frames=1).repeat(1, 1, 1, 3, 1, 1)
    out, _ = BatchAugmentation(**options)(clips, torch.arange(12) % 5, seeds(12))
    assert (out == out[:, :, :, :1]).all()
    assert not torch.equal(out, clips)


def test_clips_and_views_are_augmented_differently():
    clips = noise(videos=1, views=1).repeat(4, 3, 1, 1, 1, 1)
    out, _ = BatchAugmentation(**EACH)(clips, torch.zeros(4, dtype=torch.int64), seeds(4))
    assert len({clip.numpy().tobytes() for clip in out.flatten(0, 1)}) == 12


@pytest.mark.parametrize("views", [1, 2])
def test_seeds_decide_and_nothing_else(views):
    augment, clips, labels = BatchAugmentation(**ALL), noise(views=views), torch.tensor([0, 1, 2])
    torch.manual_seed(1)
    first = augment(clips, labels, seeds(3))
    torch.manual_seed(2)
    again = BatchAugmentation(**ALL)(clips, labels, seeds(3))
    other = augment(clips, labels, seeds(3, epoch=1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[1], other[1])


def test_the_process_s_random_numbers_go_on_as_if_nothing_had_been_drawn():
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    state = np.random.get_state()[1].copy()
    BatchAugmentation(**ALL)(noise(), torch.tensor([0, 1, 2]), seeds(3))
    assert torch.equal(torch.rand(4), wanted)
    assert (np.random.get_state()[1] == state).all()


def test_a_clip_depends_on_its_own_seed_and_view_alone():
    augment, clips = BatchAugmentation(**EACH), noise()
    together, _ = augment(clips, torch.tensor([0, 1, 2]), seeds(3))
    alone, _ = augment(clips[2:, :1], torch.tensor([2]), seeds(3)[2:])
    assert torch.equal(together[2:, :1], alone)


def test_a_number_is_a_seed_too():
    augment, clips, label = BatchAugmentation(**EACH), noise(videos=1), torch.tensor([0])
    assert torch.equal(augment(clips, label, [5])[0], augment(clips, label, [(5,)])[0])
    assert not torch.equal(augment(clips, label, [5])[0], augment(clips, label, [6])[0])


def test_mirror_probability_1_flips_every_clip_and_a_half_flips_half():
    clips, labels = noise(videos=200, views=1, frames=1, height=3, width=5), torch.zeros(200, dtype=torch.int64)
    out, _ = BatchAugmentation(mirror_probability=1.0)(clips, labels, seeds(200))
    assert torch.equal(out, clips.flip(-1))
    out, _ = BatchAugmentation(mirror_probability=0.5)(clips, labels, seeds(200))
    flipped = (out == clips.flip(-1)).flatten(1).all(1)
    assert torch.equal(out[~flipped], clips[~flipped])
    assert 70 < flipped.sum() < 130


def test_a_crop_of_the_whole_clip_to_its_own_size_changes_nothing():
    clips = noise(height=31, width=31)
    out, _ = BatchAugmentation(31, (1.0, 1.0), (1.0, 1.0))(clips, torch.tensor([0, 1, 2]), seeds(3))
    assert torch.equal(out, clips)


def test_crops_have_the_share_and_the_ratio_asked_for():
    """On a ramp from left to right the step between pixels tells the crop's width, and top to bottom its height."""
    ramp = torch.arange(200, dtype=torch.uint8)
    clips = torch.stack([ramp.expand(200, 200), ramp[:, None].expand(200, 200), torch.zeros(200, 200)])
    clips = clips.to(torch.uint8)[None, None, :, None].repeat(100, 1, 1, 1, 1, 1)
    augment = BatchAugmentation(50, (0.25, 0.36), (1.0, 1.21))
    out, _ = augment(clips, torch.zeros(100, dtype=torch.int64), seeds(100))
    assert out.shape == (100, 1, 3, 1, 50, 50)
    image = out[:, 0, :, 0].float()
    width = (image[:, 0, 25, 45] - image[:, 0, 25, 5]) / 40 * 50
    height = (image[:, 1, 45, 25] - image[:, 1, 5, 25]) / 40 * 50
    share, ratio = width * height / 200**2, width / height
    assert (share > 0.24).all()
    assert (share < 0.37).all()
    assert (ratio > 0.96).all()
    assert (ratio < 1.25).all()
    assert share.max() - share.min() > 0.08
    assert ratio.max() - ratio.min() > 0.15
    left, top = image[:, 0, 25, 0], image[:, 1, 0, 25]
    assert left.min() < 15
    assert left.max() > 70
    assert len({*zip(left.tolist(), top.tolist(), strict=True)}) > 90


def test_erasing_makes_a_rectangle_grey_and_leaves_the_rest():
    clips = levels(*[200] * 50, size=40)
    out, _ = BatchAugmentation(erase_probability=1.0)(clips, torch.zeros(50, dtype=torch.int64), seeds(50))
    assert set(out.unique().tolist()) == {int(GREY), 200}
    for image in out[:, 0, 0, 0] == GREY:
        rows, columns = image.any(1).nonzero().ravel(), image.any(0).nonzero().ravel()
        assert image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        assert image.sum() == (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
        assert 0.01 < image.float().mean() < 0.36
    half, _ = BatchAugmentation(erase_probability=0.5)(clips, torch.zeros(50, dtype=torch.int64), seeds(50))
    assert 12 < (half == GREY).flatten(1).any(1).sum() < 38


def test_rand_augment_is_torchvisions_from_the_same_seed():
    clips = noise(videos=1, views=1)
    out, _ = BatchAugmentation(rand_augment_layers=2, rand_augment_magnitude=17)(clips, torch.tensor([0]), [11])
    seed = np.random.SeedSequence(11, spawn_key=(1, 0)).generate_state(1, np.uint64)[0]
    with torch.random.fork_rng():
        torch.manual_seed(int(seed))
        wanted = v2.RandAugment(2, 17, fill=GREY)(clips[0, 0].transpose(0, 1)).transpose(0, 1)
    assert torch.equal(out[0, 0], wanted)


def test_the_order_is_crop_mirror_rand_augment_erase():
    clips = noise(videos=1, views=1)
    out, _ = BatchAugmentation(**{**EACH, "mirror_probability": 1.0, "erase_probability": 1.0})(
        clips, torch.tensor([0]), [4]
    )
    seed = np.random.SeedSequence(4, spawn_key=(1, 0)).generate_state(1, np.uint64)[0]
    with torch.random.fork_rng():
        torch.manual_seed(int(seed))
        wanted = clips[0, 0].transpose(0, 1)
        for transform in (
            v2.RandomResizedCrop(24, (0.08, 1.0), (3 / 4, 4 / 3)),
            v2.RandomHorizontalFlip(1.0),
            v2.RandAugment(3, 9, fill=GREY),
            v2.RandomErasing(1.0, value=GREY),
        ):
            wanted = transform(wanted)
    assert torch.equal(out[0, 0], wanted.transpose(0, 1))


def test_mixup_blends_each_video_with_the_one_before_it_as_its_label_says():
    clips, labels = levels(0, 100, 200, views=2), torch.tensor([3, 0, 1])
    shares = []
    for epoch in range(20):
        out, soft = BatchAugmentation(mixup_alpha=1.0, num_classes=4)(clips, labels, seeds(3, epoch))
        assert out.dtype == torch.uint8
        assert soft.shape == (3, 4)
        torch.testing.assert_close(soft.sum(1), torch.ones(3))
        for number, (own, other) in enumerate(((3, 1), (0, 3), (1, 0))):
            share = soft[number, own].item()
            assert soft[number, other].item() == pytest.approx(1 - share)
            grey = share * clips[number].max() + (1 - share) * clips[number - 1].max()
            assert (out[number] - grey).abs().max() <= 0.5 + 1e-3  # rounded, not cut off
        assert len({round(soft[n, k].item(), 5) for n, k in ((0, 3), (1, 0), (2, 1))}) == 1  # one share for the batch
        shares.append(share)
    assert max(shares) - min(shares) > 0.5


def test_cutmix_pastes_a_rectangle_of_the_share_that_the_label_says():
    clips, labels = levels(10, 20, 30, views=2, size=21), torch.tensor([3, 0, 1])
    shares = []
    for epoch in range(20):
        out, soft = BatchAugmentation(cutmix_alpha=1.0, num_classes=4)(clips, labels, seeds(3, epoch))
        torch.testing.assert_close(soft.sum(1), torch.ones(3))
        for number, (own, other) in enumerate(((3, 1), (0, 3), (1, 0))):
            pasted = out[number] == clips[number - 1]
            assert (pasted | (out[number] == clips[number])).all()
            assert (pasted == pasted[0, 0, 0]).all()  # the same place in both views, all channels and frames
            assert soft[number, own].item() == pytest.approx(1 - pasted.float().mean().item())
            assert soft[number, other].item() == pytest.approx(pasted.float().mean().item())
        shares.append(pasted.float().mean().item())
    assert max(shares) > 0.4


@pytest.mark.parametrize("kind", ["mixup_alpha", "cutmix_alpha"])
def test_a_large_alpha_mixes_about_half(kind):
    for epoch in range(20):
        out, soft = BatchAugmentation(**{kind: 1000.0}, num_classes=2)(
            levels(0, 200, size=32), torch.tensor([0, 1]), seeds(2, epoch)
        )
        if kind == "mixup_alpha":
            assert 0.4 < soft[0, 0] < 0.6
        else:  # a rectangle with a side of the root of 1 / 2 whose centre lies in the clip
            assert 0.1 < soft[0, 1] < 0.55
        assert out[0].float().mean() / 200 == pytest.approx(soft[0, 1].item(), abs=0.01)


def test_partners_have_the_same_view_number():
    clips = torch.stack([levels(10, 20), levels(30, 40)], 1).squeeze(2)  # video, view: 10 30 / 20 40
    out, soft = BatchAugmentation(mixup_alpha=1.0, num_classes=2)(clips, torch.tensor([0, 1]), seeds(2))
    share = soft[0, 0].item()
    wanted = [[round(10 * share + 20 * (1 - share)), round(30 * share + 40 * (1 - share))],
              [round(20 * share + 10 * (1 - share)), round(40 * share + 30 * (1 - share))]]  # fmt: skip
    assert out[:, :, 0, 0, 0, 0].tolist() == wanted


def test_with_both_kinds_of_mixing_each_has_half_of_the_batches():
    augment = BatchAugmentation(mixup_alpha=1.0, cutmix_alpha=1.0, num_classes=2)
    blended = 0
    for epoch in range(100):
        out, _ = augment(levels(0, 255), torch.tensor([0, 1]), seeds(2, epoch))
        blended += ((out > 0) & (out < 255)).any().item()
    assert 30 < blended < 70


def test_the_first_videos_seed_decides_the_mixing():
    augment, clips, labels = BatchAugmentation(mixup_alpha=1.0, num_classes=5), noise(), torch.tensor([0, 1, 2])
    first = augment(clips, labels, [1, 2, 3])
    assert torch.equal(augment(clips, labels, [1, 8, 9])[1], first[1])
    assert not torch.equal(augment(clips, labels, [8, 2, 3])[1], first[1])


def test_a_video_alone_mixes_with_itself():
    clips = noise(videos=1)
    for options in ({"mixup_alpha": 1.0}, {"cutmix_alpha": 1.0}):
        out, soft = BatchAugmentation(**options, num_classes=3)(clips, torch.tensor([2]), [0])
        assert torch.equal(out, clips)
        torch.testing.assert_close(soft, torch.tensor([[0.0, 0.0, 1.0]]))


def test_the_layout_in_memory_does_not_matter():
    clips, labels = noise(), torch.tensor([0, 1, 2])
    strided = clips.permute(3, 5, 0, 4, 1, 2).contiguous().permute(2, 4, 5, 0, 3, 1)
    assert not strided.is_contiguous()
    for a, b in zip(
        BatchAugmentation(**ALL)(clips, labels, seeds(3)),
        BatchAugmentation(**ALL)(strided, torch.tensor([0, 9, 1, 9, 2, 9])[::2], seeds(3)),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_a_yaml_file_builds_it():
    parser = ArgumentParser()
    parser.add_argument("--augmentation", type=BatchAugmentation)
    options = (
        "{class_path: octvideo.data.augmentation.BatchAugmentation, init_args: {crop_size: 24, crop_scale: [0.5, 1]}}"
    )
    augment = parser.instantiate_classes(parser.parse_args(["--augmentation", options])).augmentation
    assert augment(noise(), torch.tensor([0, 1, 2]), seeds(3))[0].shape == (3, 2, 3, 4, 24, 24)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_size": 0}, "crop_size must be at least 1, or None, got 0"),
        ({"crop_scale": (0.0, 1.0)}, r"crop_scale must be two shares in \(0, 1\], the smaller first, got \(0.0, 1.0\)"),
        ({"crop_scale": (0.5, 0.4)}, "crop_scale must be"),
        ({"crop_scale": (0.5, 1.1)}, "crop_scale must be"),
        ({"crop_ratio": (0.0, 1.0)}, "crop_ratio must be two positive ratios"),
        ({"crop_ratio": (2.0, 1.0)}, "crop_ratio must be two positive ratios"),
        ({"mirror_probability": 1.5}, r"mirror_probability must lie in \[0, 1\], got 1.5"),
        ({"erase_probability": -0.1}, r"erase_probability must lie in \[0, 1\], got -0.1"),
        ({"rand_augment_layers": -1}, "rand_augment_layers must be at least 0, got -1"),
        ({"rand_augment_magnitude": 31}, r"rand_augment_magnitude must lie in \[0, 30\], got 31"),
        ({"mixup_alpha": -1.0}, "data.augmentation.mixup_alpha must be at least 0, got -1.0"),
        ({"cutmix_alpha": -1.0}, "data.augmentation.cutmix_alpha must be at least 0, got -1.0"),
    ],
)
def test_wrong_numbers_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BatchAugmentation(**options)


@pytest.mark.parametrize(
    ("clips", "labels", "num_seeds", "message"),
    [
        (torch.zeros(0), torch.zeros(0), 0, r"expected clips \(B, V, C, T, H, W\) of uint8, got \(0,\)"),
        (noise()[:0], torch.zeros(0), 0, "expected clips"),
        (noise()[0], torch.zeros(2), 2, "expected clips"),
        (noise().float(), torch.zeros(3), 3, "of torch.float32"),
        (noise(), torch.zeros(2), 3, r"a label and a seed for each of 3 videos, got labels \(2,\) and 3 seeds"),
        (noise(), torch.zeros(3), 2, r"a label and a seed for each of 3 videos, got labels \(3,\) and 2 seeds"),
    ],
)
def test_wrong_batches_are_refused(clips, labels, num_seeds, message):
    with pytest.raises(ValueError, match=message):
        BatchAugmentation()(clips, labels, [0] * num_seeds)


@pytest.mark.parametrize("options", [{"mixup_alpha": 1.0}, {"cutmix_alpha": 1.0, "num_classes": 0}])
def test_mixed_labels_need_the_number_of_classes(options):
    with pytest.raises(ValueError, match=f"need num_classes of at least 1, got {options.get('num_classes')}"):
        BatchAugmentation(**options)(noise(), torch.tensor([0, 1, 2]), seeds(3))


def test_after_an_error_the_process_s_random_numbers_go_on():
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    with pytest.raises(ValueError, match="non-negative"):
        BatchAugmentation(**EACH)(noise(), torch.tensor([0, 1, 2]), [1, 2, -3])
    assert torch.equal(torch.rand(4), wanted)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_the_same():
    """What is drawn is the same; resizing and colours may round to the neighbouring level."""
    clips, labels = noise(videos=8), torch.arange(8) % 5
    torch.cuda.manual_seed(3)
    state = torch.cuda.get_rng_state()
    for options in ({"crop_size": 24}, {"mirror_probability": 0.5, "erase_probability": 0.5},
                    {"mixup_alpha": 1.0, "num_classes": 5}, {"cutmix_alpha": 1.0, "num_classes": 5}):  # fmt: skip
        here = BatchAugmentation(**options)(clips, labels, seeds(8))
        there = BatchAugmentation(**options)(clips.cuda(), labels.cuda(), seeds(8))
        assert (here[0].int() - there[0].cpu().int()).abs().max() <= 1
        torch.testing.assert_close(here[1], there[1].cpu())
    there = [BatchAugmentation(**ALL)(clips.cuda(), labels.cuda(), seeds(8))[0] for _ in range(2)]
    assert torch.equal(*there)
    assert torch.equal(torch.cuda.get_rng_state(), state)
