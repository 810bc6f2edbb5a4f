"""A process of its own for decoding, which can be killed where native code hangs or crashes."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import mmap
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from typing import Any, Generic, TypeVar

import torch

BEAT_SECONDS = 0.5  # between two signs of life
CALLS_A_TRIM = 20  # glibc keeps what is free between used pieces, some 40 MB after 20,000 clips, unless it is told
KILL_SECONDS = 5.0  # until a killed process is given up
PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that a process gets when its parent dies
_BEAT, _RESULT, _ERROR = b"beat", b"result", b"error"
Argument = TypeVar("Argument")
Result = TypeVar("Result")
_beat: Callable[[], None] | None = None  # in a watched process: how it shows that it is alive
_starting = threading.Lock()  # a process must not inherit the other end of a pipe that another thread makes


class HungError(RuntimeError):
    """A watched call that took too long, or whose process died; the message says which, in one line."""


def still_alive() -> None:
    """A sign of life of long work in a watched process, which starts its time anew; elsewhere it does nothing."""
    if _beat is not None:
        _beat()


class Watchdog(Generic[Argument, Result]):
    """Calls a function in another process, and kills that process where a call takes too long.

    A decoder that hangs in native code holds the interpreter, so neither a signal's handler nor a thread gets a turn:
    only another process can end it. The process is a fork, so it shares the function's data with its parent, starts in
    milliseconds, and stays for the next call. A fork holds no threads: the function must not use locks that other
    threads may hold, nor a library that has started threads in the parent, as decord does when it is first used.

    An object of this class starts its process at the first call, in whichever process that is, so data loaders can send
    it to their workers. Where the platform cannot fork, the function is called directly, unwatched.

    Args:
        function: what to call; its results and errors travel by pickle, arrays in them through shared memory.
        timeout_seconds: how long a call may take, or may go on without `still_alive()`.
    """

    def __init__(self, function: Callable[[Argument], Result], timeout_seconds: float) -> None:
        self.function = function
        self.timeout_seconds = timeout_seconds
        self._forget()

    def _forget(self) -> None:
        self._owner: int | None = None  # the process that may talk with the watched one
        self._pid = 0
        self._connection: Connection | None = None
        self._memory: _SharedMemory | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"function": self.function, "timeout_seconds": self.timeout_seconds}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __call__(self, argument: Argument) -> Result:
        """The function's result.

        Raises:
            HungError: no result and no sign of life in time, or the process died.
            Exception: what the function raised.
        """
        if not hasattr(os, "fork"):
            return self.function(argument)
        if self._owner != os.getpid():
            self._start()
        try:
            try:
                self._send(argument)
            except ConnectionError:  # it has died since the last call, of which this one knows nothing
                self._end()
                self._start()
                self._send(argument)
            connection, memory = self._connection, self._memory
            assert connection is not None
            assert memory is not None
            while True:
                if not connection.poll(self.timeout_seconds):
                    self.close()
                    raise HungError(f"no result within {self.timeout_seconds:g} s: the decoder was killed")
                kind = connection.recv_bytes()
                if kind != _BEAT:
                    break
            value = memory.load(*connection.recv())
        except (EOFError, ConnectionError) as error:
            raise HungError(f"the decoder's process died ({self._end()})") from error
        except BaseException:  # interrupted in the middle of a message
            self.close()
            raise
        if kind == _ERROR:
            raise value
        return value  # type: ignore[no-any-return]

    def _send(self, argument: Argument) -> None:
        assert self._connection is not None
        self._connection.send(argument)

    def _start(self) -> None:
        memory, parent = _SharedMemory(), os.getpid()
        with _starting:
            here, there = Pipe()
            pid = os.fork()
            if pid == 0:
                here.close()
                try:
                    _serve(self.function, there, memory, parent)
                finally:
                    os._exit(1)
            there.close()
        self._owner, self._pid, self._connection, self._memory = parent, pid, here, memory

    def _end(self) -> str:
        """Takes leave of a dead process; says how it ended."""
        assert self._connection is not None
        self._connection.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)  # closed its end of the pipe, and lives
        code = _wait(self._pid)
        self._forget()
        if code is None:
            return "it cannot be killed"
        return signal.Signals(-code).name if code < 0 else f"exit status {code}"

    def close(self) -> None:
        """Ends the process; the next call starts another one."""
        if self._owner == os.getpid():
            self._end()
        self._forget()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # the interpreter may be half gone
            self.close()


def outlive_signals(worker: int) -> None:
    """Lets a loader process work on when its whole group gets SIGTERM or SIGUSR1, as from Slurm and torchrun.

    The training process then finishes its step, saves and leaves, for which it needs this one. A SIGTERM that comes
    from the training process itself ends this one, as ever.

    Args:
        worker: its number, which does not matter.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # on Linux: it tells who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_for, args=(os.getppid(),), daemon=True).start()


def _end_for(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os.kill(os.getpid(), signal.SIGKILL)


def _wait(process: int) -> int | None:
    """How a killed process ended; None if it waits for a device that does not answer, and lives on."""
    deadline = time.monotonic() + KILL_SECONDS
    while time.monotonic() < deadline:
        try:
            found, status = os.waitpid(process, os.WNOHANG)
        except ChildProcessError:
            return 0
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


class _SharedMemory:
    """A file in memory that two processes map; it grows to the largest result."""

    def __init__(self) -> None:
        # Not in /dev/shm, which containers keep small.
        named = hasattr(os, "memfd_create")
        self._file = os.fdopen(os.memfd_create("octvideo"), "w+b") if named else tempfile.TemporaryFile()  # noqa: SIM115
        self._map: mmap.mmap | None = None

    def _view(self, size: int) -> memoryview:
        if self._map is None or len(self._map) < size:
            if os.fstat(self._file.fileno()).st_size < size:
                if hasattr(os, "posix_fallocate"):  # full memory is an error here, and a crash later
                    os.posix_fallocate(self._file.fileno(), 0, size)
                else:
                    self._file.truncate(size)
            self._map = mmap.mmap(self._file.fileno(), 0)
        return memoryview(self._map)

    def store(self, value: Any) -> tuple[bytes, list[int]]:
        """Puts the arrays of a value into the memory; returns its pickle, and the arrays' sizes in bytes."""
        buffers: list[pickle.PickleBuffer] = []
        message = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
        sizes = [buffer.raw().nbytes for buffer in buffers]
        if sizes:
            view, start = self._view(sum(sizes)), 0
            for buffer, size in zip(buffers, sizes, strict=True):
                view[start : start + size] = buffer.raw()
                start += size
        return message, sizes

    def load(self, message: bytes, sizes: list[int]) -> Any:
        """The value, its arrays copied."""
        buffers, start = [], 0
        for size in sizes:
            buffers.append(bytearray(self._view(start + size)[start : start + size]))
            start += size
        return pickle.loads(message, buffers=buffers)


def _serve(function: Callable[[Any], Any], connection: Connection, memory: _SharedMemory, parent: int) -> None:
    """The watched process: answers calls until its parent closes the pipe or dies."""
    global _beat, _starting
    _starting = threading.Lock()  # the parent's is held
    torch.set_num_threads(1)  # the parent's threads are not here, and PyTorch would wait for them
    if sys.platform == "linux":  # a call that hangs would never see the pipe closed
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # sent to the whole group, they are for the training process to handle
    last_beat = 0.0

    def beat() -> None:
        nonlocal last_beat
        if time.monotonic() >= last_beat + BEAT_SECONDS:
            connection.send_bytes(_BEAT)
            last_beat = time.monotonic()

    _beat = beat
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    for call in itertools.count(1):
        if trim is not None and call % CALLS_A_TRIM == 0:
            trim(0)
        try:
            argument = connection.recv()
        except (EOFError, ConnectionError):
            return
        try:
            kind, answer = _RESULT, memory.store(function(argument))
        except Exception as error:  # it is raised again in the parent
            kind, answer = _ERROR, memory.store(_portable(error))
        connection.send_bytes(kind)
        connection.send(answer)


def _portable(error: Exception) -> Exception:
    """The error, or one that says the same, which survives the way to another process."""
    trace = "".join(traceback.format_exception(error))
    error.add_note(trace)
    try:
        if isinstance(pickle.loads(pickle.dumps(error)), Exception):
            return error
    except Exception:  # whatever its class makes of a pickle
        pass
    return RuntimeError(f"{type(error).__name__}: {error}\n{trace}")
