"""Child processes of sweep and tune: what they leave of their output, how they are stopped, and who may write."""

import os
import signal
import sys
import threading

import pytest

from octvideo.commands import children


def test_what_a_called_tool_says_is_kept_and_its_last_line_is_the_reason(tmp_path, monkeypatch):
    (tmp_path / "tool.py").write_text("import sys\nprint(sys.argv[1])\nsys.exit(sys.argv[2] if sys.argv[2:] else 0)\n")
    monkeypatch.setattr(children, "COMMAND", [sys.executable])
    children.call(str(tmp_path / "tool.py"), ["good"], tmp_path / "log.txt")
    with pytest.raises(children.RunFailedError, match=r"^the reason$"):
        children.call(str(tmp_path / "tool.py"), ["bad", "a warning\nthe reason\n"], tmp_path / "log.txt")
    assert (tmp_path / "log.txt").read_text() == "good\nbad\na warning\nthe reason\n\n"


def test_an_interrupted_call_lets_the_tool_end_and_keeps_what_it_said(tmp_path, monkeypatch):
    (tmp_path / "tool.py").write_text(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved', file=sys.stderr), sys.exit(75)))\n"
        "open(sys.argv[1], 'w').close()\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(children, "COMMAND", [sys.executable])
    started = tmp_path / "started"

    def interrupt(*_):
        raise KeyboardInterrupt

    def wait_and_interrupt():
        while not started.exists():
            threading.Event().wait(0.01)
        os.kill(os.getpid(), signal.SIGUSR2)

    before = signal.signal(signal.SIGUSR2, interrupt)
    thread = threading.Thread(target=wait_and_interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            children.call(str(tmp_path / "tool.py"), [str(started)], tmp_path / "log.txt")
    finally:
        thread.join()
        signal.signal(signal.SIGUSR2, before)
    assert (tmp_path / "log.txt").read_text() == "saved\n"


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ("os.kill(os.getpid(), 9)", "tool.py was killed by SIGKILL"),
        ("print(' ', file=sys.stderr); os._exit(3)", "tool.py ended with 3"),
        ("print('a warning', file=sys.stderr)", None),
    ],
)
def test_a_killed_tool_is_said_to_be(tmp_path, monkeypatch, end, reason):
    (tmp_path / "tool.py").write_text(f"import os, sys\n{end}\n")
    monkeypatch.setattr(children, "COMMAND", [sys.executable])
    monkeypatch.chdir(tmp_path)
    if reason is None:
        children.call("tool.py", [], tmp_path / "log.txt")
        return
    with pytest.raises(children.RunFailedError, match=f"^{reason}$"):
        children.call("tool.py", [], tmp_path / "log.txt")
