"""Watched calls: results and errors come through, hangs and crashes end, and nothing is left behind."""

import ctypes
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection

import av
import numpy as np
import pytest
import torch
from conftest import ROOT

from octvideo.data.watchdog import HungError, Watchdog, still_alive
from octvideo.errors import DecodeError


def hold_the_interpreter(_):
    """Hangs in native code that does not let other threads of Python run."""
    ctypes.PyDLL(None).pause()


def test_results_come_through_with_their_arrays_and_can_be_changed():
    watchdog = Watchdog(lambda size: {"a": np.arange(size), "b": [np.ones((2, 3), np.uint8), "text"]}, 30)
    for size in (10, 100_000, 5):
        result = watchdog(size)
        assert np.array_equal(result["a"], np.arange(size))
        assert np.array_equal(result["b"][0], np.ones((2, 3), np.uint8))
        result["a"] += 1
    first = watchdog(4)
    watchdog(7)
    assert first["a"].tolist() == [0, 1, 2, 3]


def test_errors_come_through_as_they_are():
    def fail(message):
        raise DecodeError("a.mp4", message)

    watchdog = Watchdog(fail, 30)
    for message in ("broken", "empty"):
        with pytest.raises(DecodeError, match=f"a.mp4: {message}"):
            watchdog(message)


def test_one_process_serves_many_calls_and_a_new_one_follows_a_hang():
    def work(seconds):
        if seconds:
            hold_the_interpreter(None)
        return os.getpid()

    watchdog = Watchdog(work, 0.5)
    first = watchdog(0)
    assert first not in (os.getpid(), None)
    assert watchdog(0) == first
    with pytest.raises(HungError, match=r"no result within 0.5 s: the decoder was killed"):
        watchdog(1)
    assert watchdog(0) != first
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)


def test_a_crash_is_named():
    watchdog = Watchdog(lambda number: os.kill(os.getpid(), number), 30)
    with pytest.raises(HungError, match=r"process died \(SIGKILL\)"):
        watchdog(signal.SIGKILL)
    with pytest.raises(HungError, match=r"process died \(exit status 3\)"):
        Watchdog(os._exit, 30)(3)


def test_a_process_that_died_between_two_calls_is_no_fault_of_the_next_one():
    watchdog = Watchdog(lambda _: os.getpid(), 30)
    first = watchdog(None)
    os.kill(first, signal.SIGKILL)
    os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
    assert watchdog(None) not in (first, os.getpid())


def test_a_process_that_dies_again_and_again_is_a_hang(monkeypatch):
    monkeypatch.setattr("octvideo.data.watchdog._serve", lambda *arguments: os._exit(7))
    with pytest.raises(HungError, match=r"process died \(exit status 7\)"):
        Watchdog(len, 30)(bytes(5_000_000))


class TwoArgumentsError(Exception):
    def __init__(self, first, second):
        super().__init__(f"{first} {second}")


def test_errors_that_cannot_travel_are_told_and_are_no_hang():
    class LocalError(Exception):
        pass

    def fail(error):
        raise LocalError("of a kind that is not found") if error is None else TwoArgumentsError("one", "two")

    watchdog = Watchdog(fail, 30)
    for argument, message in ((None, "LocalError: of a kind that is not found"), (1, "TwoArgumentsError: one two")):
        with pytest.raises(RuntimeError, match=message) as caught:
            watchdog(argument)
        assert not isinstance(caught.value, HungError)
        assert "test_watchdog.py" in str(caught.value)


def test_errors_that_travel_say_where_they_came_from():
    def divide(number):
        return 1 / number

    with pytest.raises(ZeroDivisionError) as caught:
        Watchdog(divide, 30)(0)
    assert "return 1 / number" in caught.value.__notes__[0]


def test_a_process_that_cannot_be_killed_is_given_up(monkeypatch):
    monkeypatch.setattr("octvideo.data.watchdog.KILL_SECONDS", 0.05)
    watchdog = Watchdog(lambda _: os.getpid(), 30)
    process = watchdog(None)
    with monkeypatch.context() as patch:
        patch.setattr(os, "kill", lambda pid, number: None)
        patch.setattr(os, "waitpid", lambda pid, options: (0, 0))
        assert watchdog._end() == "it cannot be killed"
    assert watchdog(None) != process


def test_without_a_file_in_memory_an_ordinary_one_serves(monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    monkeypatch.delattr(os, "posix_fallocate")
    assert np.array_equal(Watchdog(np.arange, 30)(1000), np.arange(1000))


def test_signs_of_life_give_more_time():
    def slow(beats):
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            if beats:
                still_alive()
        return "done"

    assert Watchdog(slow, 1.0)(True) == "done"
    with pytest.raises(HungError):
        Watchdog(slow, 1.0)(False)
    still_alive()  # of no effect where nobody watches


def test_the_clock_starts_when_the_process_takes_up_the_call(monkeypatch):
    limits, poll = [], Connection.poll

    def record(connection, limit):
        limits.append(limit)
        return poll(connection, limit)

    monkeypatch.setattr(Connection, "poll", record)
    watchdog = Watchdog(len, 10)
    assert watchdog("four") + watchdog("three") == 9
    assert limits == [60, 10, 60, 10]  # to take it up, on however busy a machine; to answer


def test_threads_watch_each_their_own_process():
    watchdogs = [Watchdog(lambda number: (number, os.getpid()), 30) for _ in range(4)]
    results = [[] for _ in watchdogs]

    def call(index):
        results[index] = [watchdogs[index](number) for number in range(50)]

    threads = [threading.Thread(target=call, args=(index,)) for index in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert all([number for number, _ in result] == list(range(50)) for result in results)
    assert len({process for result in results for _, process in result}) == 4


def test_a_copy_in_another_process_starts_a_process_of_its_own():
    watchdog = Watchdog(len, 30)
    assert watchdog("four") == 4
    copy = pickle.loads(pickle.dumps(watchdog))
    assert copy("three") == 5
    assert copy._pid != watchdog._pid
    inherited = Watchdog(lambda _: watchdog("in the child"), 30)
    assert inherited(None) == 12
    assert watchdog("again") == 5


def test_closing_ends_the_process_and_leaves_no_open_files():
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        watchdog = Watchdog(lambda _: os.getpid(), 30)
        process = watchdog(None)
        watchdog.close()
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
        dropped = Watchdog(lambda _: np.zeros(1000), 30)
        dropped(None)
        del dropped
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died")
def test_a_process_that_hangs_dies_with_its_parent():
    program = (
        "import os, sys, signal; from octvideo.data.watchdog import Watchdog\n"
        "import ctypes\n"
        "def hang(_):\n    print(os.getpid(), flush=True)\n    ctypes.PyDLL(None).pause()\n"
        "Watchdog(hang, 100)(None)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=ROOT, text=True) as parent:
        assert int(parent.stdout.readline()) != parent.pid
        parent.kill()
        parent.wait()
        assert parent.stdout.read() == ""  # the other end is open as long as the watched process lives


def test_without_fork_the_function_is_called_directly(monkeypatch):
    monkeypatch.delattr(os, "fork")
    assert Watchdog(lambda _: os.getpid(), 1)(None) == os.getpid()


def test_pytorch_works_in_a_watched_process_after_its_threads_ran_in_the_parent():
    def total(count):
        return torch.ones(count).cumsum(0).mul(2).sum().item()

    assert Watchdog(total, 60)(2_000_000) == total(2_000_000)
    assert Watchdog(lambda _: torch.get_num_threads(), 60)(None) == 1


def test_scalers_of_other_threads_are_no_obstacle():
    """PyAV 19 keeps one for each thread, whose end in a fork of another thread would be waited for in vain."""
    scaled, end = threading.Event(), threading.Event()

    def scale():
        frame = av.VideoFrame.from_ndarray(np.zeros((360, 640, 3), np.uint8), "rgb24")
        frame.reformat(320, 180, "yuv420p")
        scaled.set()
        end.wait()

    other = threading.Thread(target=scale)
    other.start()
    assert scaled.wait(30)
    watched = Watchdog(abs, 10)
    try:
        assert watched(-3) == 3
    finally:
        watched.close()
        end.set()
        other.join()
