"""A command that is stopped says so in one line, whatever it was doing and however long the key is held down."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")

WORKING = """
import sys, time
import advisor.profiles
def work(*_, **__):
    try:
        print("working", flush=True)
        time.sleep(60)
    except BaseException as error:
        if "--device" in sys.argv:
            raise ImportError("numpy was interrupted") from error
        raise
    finally:
        time.sleep(0.1)
        print("cleaned", flush=True)
advisor.profiles.find_model = work
from advisor.__main__ import main
main()
"""

IMPORTING = """
import os, signal, sys
module = sys.argv.pop()
class Signalled:
    def find_spec(self, name, *_):
        if name == module:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Signalled())
from advisor.__main__ import main
main()
"""


def start(program: str, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("device", [[], ["--device", "cpu"]])
def test_every_signal_unwinds_the_command_once(number: signal.Signals, device: list[str]) -> None:
    """A library may have made an error of its own of it."""
    process = start(WORKING, *(device or ["--gpu", "t4"]))
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "working\n"
    while process.poll() is None:  # a key held down
        process.send_signal(number)
        time.sleep(0.01)
    with process:
        said, error = process.stdout.read(), process.stderr.read()
    assert (process.returncode, said, error.strip()) == (128 + number, "cleaned\n", "Stopped.")


@pytest.mark.parametrize("module", ["advisor.cli", "click", "advisor.cli.main"])
def test_stopped_while_it_is_imported_it_shows_no_traceback(module: str) -> None:
    process = start(IMPORTING, module)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.strip() in ("", "Stopped.")
