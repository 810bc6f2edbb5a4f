"""Shared memory, where loader processes put their clips: whether it is large enough."""

import os
import shutil

from octvideo.errors import UserError

SHARED_MEMORY = "/dev/shm"  # on Linux
ENLARGE = f"enlarge {SHARED_MEMORY} (docker run --shm-size or --ipc=host)"


def check_shared_memory(wanted_bytes: int) -> None:
    """Refuses more waiting clips than /dev/shm has room for."""
    if not os.path.isdir(SHARED_MEMORY):
        return
    if wanted_bytes > (free := shutil.disk_usage(SHARED_MEMORY).free):
        sizes = f"need {wanted_bytes / 2**20:.0f} MiB of {SHARED_MEMORY}, where {free / 2**20:.0f} MiB are free"
        raise UserError(f"waiting clips {sizes}: {ENLARGE}, or lower data.num_workers or data.prefetch_batches")
