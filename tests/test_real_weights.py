"""The comparison of networks with published weights: which cuts are kept, what is measured again, what is drawn."""

import json
from pathlib import Path

import pytest
import torch

from experiments import real_weights
from experiments.real_weights import compare_cuts, cuts_of, divide, draw, find_videos, images, parse, splice
from octvideo.errors import UserError


def probabilities(length, **peaks):
    found = torch.zeros(length)
    for frame, value in peaks.items():
        found[int(frame[1:])] = value
    return found


def test_a_cut_is_the_peak_of_a_run():
    assert cuts_of(probabilities(20, f0=0.6, f5=0.7, f6=0.9, f7=0.6, f12=0.5, f19=0.8)) == [0, 6, 19]


def test_cuts_are_kept_within_two_frames_and_count_once():
    vanilla = probabilities(50, f5=0.9, f20=0.9, f30=0.9)
    octave = probabilities(50, f7=0.9, f19=0.9, f21=0.9, f33=0.9)
    wanted = {"cuts": 3, "kept": 2, "new": 2, "found": 1, "flips": 7 / 50, "change": 6.3 / 50}
    assert compare_cuts(vanilla, octave, [6]) == pytest.approx(wanted)


def test_films_and_frames_come_evenly_from_the_videos_of_the_comparison(motions):
    videos = find_videos([motions / "train", motions / "val"])
    compared, calibrated = divide(videos, calibration=False), divide(videos, calibration=True)
    for paths, one, other in zip(videos, compared, calibrated, strict=True):
        assert sorted(one + other) == paths
        assert len(other) == -(-len(paths) // 4)
    film, cuts = splice(compared, 5)
    assert film.shape[1:] == (27, 48, 3)
    assert film.dtype == torch.uint8
    assert len(cuts) == 5
    assert 0 < cuts[0] < cuts[-1] < len(film)
    frames = images(compared, 7)
    assert frames.shape == (7, 3, 224, 224)
    assert -1 <= frames.min() < 0 < frames.max() <= 1
    with pytest.raises(UserError, match="at least 2 are needed"):
        find_videos([Path("nowhere")])


def test_rows_that_are_there_are_not_measured_again(tmp_path, motions, monkeypatch):
    measured = []

    def network(options):
        for alpha in (0, 0.5):

            def measure(alpha=alpha):
                measured.append(alpha)
                if alpha and len(measured) == 2:
                    raise KeyboardInterrupt
                return {"macs": 10 - 10 * alpha, "agreement": 1 - alpha, "divergence": alpha}

            yield {"alpha": alpha, **({"strided": "keep", "chosen": True} if alpha else {"frames": 7})}, measure

    monkeypatch.setattr(real_weights, "NETWORKS", {"lite0": network})
    options = parse([str(motions / "val"), "--output", str(tmp_path)])
    options.videos = find_videos(options.videos)
    path = tmp_path / "rows.json"
    with pytest.raises(KeyboardInterrupt):
        real_weights.measure(options, path)
    rows = real_weights.measure(options, path)
    assert measured == [0, 0.5, 0.5]
    assert rows == json.loads(path.read_text())["rows"]
    (line,) = draw(rows).axes[0].lines
    assert (line.get_label(), *line.get_xydata()[0].tolist()) == ("strides keep, choose_low", 0.5, 50)
    options.frames += 1
    with pytest.raises(UserError, match="other videos, cuts or frames"):
        real_weights.measure(options, path)
