"""The supervision of a training: signals, crashes, and that nothing is ever left running.

A stand-in takes accelerate's place: a process that starts another one and waits for it, as accelerate does. The other
behaves as the trainer does when it is signalled, in a tenth of a second.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and sessions are POSIX")

ROOT = Path(__file__).parents[2]
PATIENCE = 120.0

TRAINER = """
import json, os, signal, sys, threading, time
run, behaviour = sys.argv[1:]
stopped = []
def receive(number, frame):
    stopped.append(number)
def write(outcome):
    result = {"schema": 1, "outcome": outcome, "signal": stopped[0] if stopped else None, "step": 3, "steps": 10}
    result["host_peak_bytes"] = 7_000_000
    open(run + "/result.json", "w").write(json.dumps(result))
def watch():
    while os.read(0, 100): pass
    os.kill(os.getpid(), signal.SIGTERM)
if behaviour != "unready":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, receive)
    threading.Thread(target=watch, daemon=True).start()
if behaviour not in ("unready", "unknown"):
    open(run + "/trainer.pid.part", "w").write(str(os.getpid()))
    os.replace(run + "/trainer.pid.part", run + "/trainer.pid")
open(run + "/began", "w").close()
if behaviour == "finish":
    write("finished")
elif behaviour == "fill":
    with open(run + "/filler", "wb", buffering=0) as file:
        for size in (2**20, 1):
            try:
                while True: file.write(bytes(size))
            except OSError as error: full = error
    raise full
elif behaviour == "crash":
    raise RuntimeError("the reason why")
else:
    while not stopped or behaviour == "hang":
        time.sleep(0.02)
    time.sleep(0.3)
    os.makedirs(run + "/checkpoints/checkpoint-3")
    write("interrupted")
    sys.exit(1)
"""

PARENT = """
import json, os, signal, subprocess, sys
from collections import UserDict
from dataclasses import asdict
from advisor.launch.command import Command
from advisor.launch.process import supervise
launcher = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, *sys.argv[1:]]) and 1)"
words = (sys.executable, "-c", launcher, *sys.argv[1:])
class Signalling(UserDict):
    def keys(self):
        os.kill(os.getpid(), signal.SIGTERM)
        return super().keys()
environment = Signalling() if sys.argv[3] == "unstarted" else {}
subprocess.run([sys.executable, "-c", "bytes(2**27)"], check=True)
print(json.dumps(asdict(supervise(Command(words=words, environment=environment), sys.argv[2]))))
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "trainer.py").write_text(TRAINER)
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def start(run: Path, behaviour: str, **options: Any) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", PARENT, str(run.parent / "trainer.py"), str(run), behaviour]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )


def until(path: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.02)


def ended(parent: subprocess.Popen[str], run: Path, seconds: float = PATIENCE) -> dict[str, Any]:
    out, error = parent.communicate(timeout=seconds)
    assert parent.returncode == 0, error
    assert survivors(run) == []
    answer: dict[str, Any] = json.loads(out)
    return answer


def survivors(run: Path) -> list[int]:
    """Processes whose command line names the run folder."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if str(run) in words and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process.pid)
    return found


def test_the_result_file_is_what_says_how_it_ended(run: Path) -> None:
    answer = ended(start(run, "finish"), run)
    assert answer["result"]["outcome"] == "finished"
    assert (answer["signal"], answer["exit_code"], answer["killed"]) == (None, 0, False)
    # The trainer's own word: a larger process that ended before, as a probe's, is not the training.
    assert answer["result"]["host_peak_bytes"] == 7_000_000


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_reaches_the_trainer_and_its_saving_is_waited_for(run: Path, number: signal.Signals) -> None:
    parent = start(run, "train")
    until(run / "trainer.pid")
    parent.send_signal(number)
    answer = ended(parent, run)
    assert answer["signal"] == number
    assert answer["result"]["signal"] == number
    assert (run / "checkpoints" / "checkpoint-3").is_dir()


def test_a_ctrl_c_in_the_terminal_is_one_signal_to_the_trainer(run: Path) -> None:
    """The terminal signals its whole foreground group; the training is in a session of its own."""
    parent = start(run, "train")
    until(run / "trainer.pid")
    trainer = int((run / "trainer.pid").read_text())
    assert os.getsid(trainer) != os.getsid(parent.pid)
    parent.send_signal(signal.SIGINT)
    assert ended(parent, run)["result"]["outcome"] == "interrupted"


def test_a_closed_terminal_does_not_stop_what_runs_under_nohup(run: Path) -> None:
    parent = start(run, "train", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    until(run / "trainer.pid")
    parent.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert not (run / "result.json").exists()
    parent.send_signal(signal.SIGTERM)
    answer = ended(parent, run)
    assert (answer["signal"], answer["result"]["signal"]) == (signal.SIGTERM, signal.SIGTERM)


def test_the_second_ctrl_c_ends_a_trainer_that_hangs(run: Path) -> None:
    parent = start(run, "hang")
    until(run / "trainer.pid")
    parent.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert parent.poll() is None
    while parent.poll() is None:  # two signals that come before the first was heard are one
        parent.send_signal(signal.SIGINT)
        time.sleep(0.3)
    answer = ended(parent, run)
    assert answer["killed"]
    assert answer["result"]["outcome"] == "interrupted"
    assert json.loads((run / "result.json").read_text())["message"] == "It was stopped at once."


def test_a_signal_before_the_trainer_is_there_ends_everything(run: Path) -> None:
    parent = start(run, "unready")
    until(run / "began")
    parent.send_signal(signal.SIGTERM)
    answer = ended(parent, run)
    assert answer["result"]["outcome"] == "interrupted"
    assert "before the first step" in answer["result"]["message"]


def test_a_signal_before_anything_is_started_ends_it(run: Path) -> None:
    """It comes while the environment of accelerate is put together."""
    answer = ended(start(run, "unstarted"), run)
    assert (answer["signal"], answer["result"]["outcome"]) == (signal.SIGTERM, "interrupted")


def test_a_trainer_that_outlives_accelerate_may_write_how_it_ended(run: Path) -> None:
    """Its process id was not known yet, so all of the group were signalled."""
    parent = start(run, "unknown")
    until(run / "began")
    parent.send_signal(signal.SIGTERM)
    assert ended(parent, run)["result"]["step"] == 3


def test_a_trainer_whose_parent_was_killed_saves_and_stops(run: Path) -> None:
    parent = start(run, "train")
    until(run / "trainer.pid")
    parent.kill()
    parent.communicate()
    until(run / "result.json")
    deadline = time.monotonic() + PATIENCE
    while survivors(run) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert survivors(run) == []
    assert (run / "checkpoints" / "checkpoint-3").is_dir()


def test_a_crash_is_told_with_the_end_of_the_log(run: Path) -> None:
    (run / "log.txt").write_text("what an earlier attempt said\n")
    answer = ended(start(run, "crash"), run)
    assert answer["result"]["outcome"] == "failed"
    assert "RuntimeError: the reason why" in answer["result"]["message"]
    assert "earlier attempt" not in answer["result"]["message"]
    assert "what an earlier attempt said" in (run / "log.txt").read_text()


def test_a_trainer_whose_disk_left_no_room_for_a_word_is_told_by_the_disk(small_disk: Path) -> None:
    (small_disk / "trainer.py").write_text(TRAINER)
    (small_disk / "run").mkdir()
    answer = ended(start(small_disk / "run", "fill"), small_disk / "run")
    assert (answer["result"]["outcome"], answer["result"]["hint"]) == ("disk_full", "Free some space.")


def test_a_result_of_an_earlier_attempt_is_not_taken_for_this_one_s(run: Path) -> None:
    (run / "result.json").write_text('{"schema": 1, "outcome": "finished"}')
    assert ended(start(run, "crash"), run)["result"]["outcome"] == "failed"
