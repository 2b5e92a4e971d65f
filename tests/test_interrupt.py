"""A first signal is a flag that work looks at between its batches; a second one ends the process at once."""

import os
import signal
import subprocess
import sys

import pytest

from raft_jax import interrupt
from raft_jax.progress import progress


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_looked_at_between_batches(number, capsys):
    before, finished = signal.getsignal(number), []
    words = f"^stopped by {number.name}; the same command goes on from here$"
    with (
        pytest.raises(KeyboardInterrupt, match=words),
        interrupt.handled(),
        progress("judge", 3, "rows") as bar,
    ):
        for row in range(3):
            if row == 1:
                os.kill(os.getpid(), number)
            finished.append(row)  # what is in hand is finished
            bar.advance()
    assert finished == [0, 1]
    assert signal.getsignal(number) is before and interrupt.requested() is None


def test_what_saves_itself_is_left_to_do_so():
    with interrupt.handled():
        with interrupt.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            interrupt.check()
            assert interrupt.requested() == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            interrupt.check()


SWALLOWS = """
import sys, time
from raft_jax import interrupt
with interrupt.handled():
    print("ready", flush=True)
    while True:
        try:
            {work}
        except BaseException:  # as a callback of JAX does
            pass
        print("asked" if interrupt.requested() else "on", flush=True)
"""


@pytest.mark.parametrize("work", ["time.sleep(0.01)", "sum(range(10**5))"])
def test_a_second_signal_does_not_wait(work):
    """Not even where whatever runs would catch an exception."""
    program = [sys.executable, "-c", SWALLOWS.format(work=work)]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        while (line := process.stdout.readline()) == "on\n":
            pass
        assert line == "asked\n"
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error == "\nraft-jax: stopped at once by a second SIGINT; the same command goes on from here\n"


def test_a_second_signal_ends_a_call_that_runs_no_python():
    """A long call into C that has let go of the interpreter, as a compilation does."""
    program = (
        "import ctypes, threading\nfrom raft_jax import interrupt\nlibc = ctypes.CDLL(None)\n"
        "with interrupt.handled():\n    print('ready', flush=True)\n    libc.getchar()\n    libc.getchar()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
