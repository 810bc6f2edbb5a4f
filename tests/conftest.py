"""What several test files share: videos written by the tests, and the folder of real ones."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from octvideo.data.motions import write_video

ROOT = Path(__file__).parent.parent
REAL_VIDEOS = Path(os.environ.get("OCTVIDEO_REAL_VIDEOS", ROOT.parent / "shared" / "data"))


@pytest.fixture(scope="session")
def real_videos():
    """A folder with fight/, clips/ and odd/; not part of the project."""
    if not REAL_VIDEOS.is_dir():
        pytest.skip(
            f"no real videos in {REAL_VIDEOS} (set OCTVIDEO_REAL_VIDEOS to a folder with fight/, clips/ and odd/)"
        )
    return REAL_VIDEOS


@pytest.fixture(scope="session")
def numbered_video(tmp_path_factory):
    """A video of 60 frames at 30 fps, 64 x 48, key frames every 12, whose grey level is 4 times the frame number."""
    path = tmp_path_factory.mktemp("videos") / "with a space.mp4"
    frames = np.broadcast_to((4 * np.arange(60, dtype=np.uint8))[:, None, None, None], (60, 48, 64, 3))
    write_video(path, frames, 30)
    return path


def frame_numbers(frames):
    """The frame numbers that grey levels (T, H, W, C) stand for."""
    return (np.asarray(frames).mean((1, 2, 3)) / 4).round().astype(int).tolist()


def run_tool(name, *options, timeout=600, **environment):
    """Runs a script of tools/ as a user does; returns the finished process."""
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / name), *map(str, options)],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        env={**os.environ, **environment},
    )
