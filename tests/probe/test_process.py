"""Probes as processes: what runs, what runs out of memory, what is killed; and that nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from advisor.errors import EnvironmentLacksError
from advisor.memory.kernels import Cpu
from advisor.memory.kernels import Gpu as KernelGpu
from advisor.memory.trace.run import record, summarize
from advisor.plan import Plan
from advisor.probe.measure import Subject, measure
from advisor.probe.measurement import ProbeRequest, measurement_of, write_request
from advisor.probe.process import probe
from advisor.units import MIB

from .conftest import METHODS, SMALL, small_plan

ROOT = Path(__file__).parents[2]
RANDOM_STATE_BYTES = 5056
"""Checkpointing keeps torch's CPU random state for each layer, made where no dispatch mode sees it."""

TOLERANCE = 0.005
"""That of the trace against the trainer."""

ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PHI3_ADVISE_STATE", str(tmp_path))
    return tmp_path


def run(plan: Plan, **fields: Any) -> Any:
    request = ProbeRequest(plan=plan, architecture=SMALL, device="cpu", **fields)
    return probe(request, ENVIRONMENT, timeout_seconds=300)


def children(state: Path) -> list[psutil.Process]:
    """Probes of this state folder that still run."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if any(str(state) in word for word in words) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def is_empty(state: Path) -> bool:
    return not list((state / "running").iterdir()) and not children(state)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation": 3, "padding": "longest"},
        {"autocast": "bfloat16"},
        {"autocast": "bfloat16", "loss": "chunked", "gradient_checkpointing": False},
    ],
    ids=["plain", "padded", "autocast", "autocast-chunked"],
)
def test_what_is_measured_is_what_the_trace_said_of_the_same_plan(
    method: str, settings: dict[str, Any], state: Path
) -> None:
    plan = small_plan(method, seq_len=256, **settings)
    found = run(plan)
    assert found.outcome == "ran", found.message
    assert found.steps == 3
    events, built = record(plan, SMALL, Cpu(), steps=2)
    traced = summarize(events, built, KernelGpu())
    kept = RANDOM_STATE_BYTES * SMALL["num_hidden_layers"]
    assert traced.allocated_bytes == pytest.approx(found.allocated_bytes - kept, rel=TOLERANCE)
    peaks = {"saving": traced.saving_bytes, **traced.peaks}
    compared = set(found.moments)
    for moment in compared:
        measured = found.moments[moment]
        assert peaks[moment] == pytest.approx(measured, rel=2 * TOLERANCE), moment
    assert set(found.moments) >= {"loading", "forward", "loss", "loss backward", "evaluation", "saving"}
    assert found.tokens_per_second > 0
    assert found.seconds_per_step > 0
    assert found.versions["torch"]
    assert is_empty(state)


BARE = """
import sys
for name in ("datasets", "pyarrow", "pandas", "trl"):
    sys.modules[name] = None
from advisor.probe.child import main
sys.exit(main(sys.argv[1]))
"""


def test_a_dry_run_needs_neither_datasets_nor_what_comes_with_it(state: Path) -> None:
    request = ProbeRequest(plan=small_plan(), architecture=SMALL, device="cpu", steps=2)
    write_request(request, str(state / "request.json"))
    with subprocess.Popen(
        [sys.executable, "-c", BARE, state],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **ENVIRONMENT},
    ) as child:
        assert child.stdout is not None
        said = child.stdout.read()
    assert child.returncode == 0, said.decode()
    assert (state / "result.json").exists()


def test_memory_that_runs_out_is_an_answer(state: Path) -> None:
    """8 × 1,024 tokens × 32,064 logits take a gigabyte in fp32: far above what the process may map."""
    plan = small_plan(micro_batch=8, seq_len=1024)
    request = ProbeRequest(plan=plan, architecture={**SMALL, "vocab_size": 32064}, device="cpu", cap_bytes=128 * MIB)
    found = probe(request, ENVIRONMENT, timeout_seconds=300)
    assert found.outcome == "out_of_memory"
    assert "was asked for" in found.message
    assert found.failed_at.startswith("step 1, ")
    assert found.allocated_bytes is not None
    assert is_empty(state)


def test_a_peak_above_the_cap_is_out_of_memory_to_the_byte(state: Path) -> None:
    plan = small_plan()
    peak = run(plan, steps=2, saves=False).allocated_bytes
    assert run(plan, steps=2, saves=False, cap_bytes=peak).outcome == "ran"
    assert run(plan, steps=2, saves=False, cap_bytes=peak - 1).outcome == "out_of_memory"
    assert is_empty(state)


def test_rows_are_as_long_as_the_datas_longest() -> None:
    plan = small_plan(seq_len=1024)
    full, short = run(plan, steps=2, saves=False), run(plan, steps=2, saves=False, longest=100)
    assert (full.tokens_a_micro_step, short.tokens_a_micro_step) == (2048, 200)
    assert short.allocated_bytes < 0.5 * full.allocated_bytes
    assert full.notes == ()
    assert short.notes == ("Rows are 100 tokens, as the data's longest; the plan has room for 1,024.",)


def test_what_the_training_refuses_is_a_failure_with_its_reason(state: Path) -> None:
    found = run(small_plan("full", autocast="float16"))
    assert found.outcome == "failed"
    assert "float16" in found.message
    assert is_empty(state)


def test_a_child_that_is_killed_is_a_failure_and_the_parent_lives(state: Path) -> None:
    def kill() -> None:
        while not (running := children(state)):
            time.sleep(0.05)
        time.sleep(0.2)
        running[0].send_signal(signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    found = run(small_plan())
    thread.join()
    assert found.outcome == "failed"
    assert "killed from outside" in found.message
    assert is_empty(state)


def test_one_that_takes_too_long_is_stopped(state: Path) -> None:
    request = ProbeRequest(plan=small_plan(), architecture=SMALL, device="cpu")
    found = probe(request, ENVIRONMENT, timeout_seconds=0.2)
    assert found.outcome == "stopped"
    assert is_empty(state)


PARENT = """
import signal, sys
# A shell that starts tests in the background has them ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
from advisor.probe.measurement import read_request
from advisor.probe.process import probe
probe(read_request(sys.argv[1]))
"""


@pytest.mark.skipif(os.name != "posix", reason="kill -9")
@pytest.mark.parametrize("number", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_a_parent_that_is_killed_leaves_no_process_and_no_folder(number: str, state: Path) -> None:
    path = state / "request.json"
    write_request(ProbeRequest(plan=small_plan(), architecture=SMALL, device="cpu"), str(path))
    environment = {**os.environ, **ENVIRONMENT}
    parent = subprocess.Popen([sys.executable, "-c", PARENT, path], env=environment, stderr=subprocess.DEVNULL)
    while not (state / "running").exists() or not any("child" in " ".join(p.cmdline()) for p in children(state)):
        assert parent.poll() is None
        time.sleep(0.05)
    time.sleep(1.5)
    parent.send_signal(getattr(signal, number))
    parent.wait(120)
    until = time.monotonic() + 120
    while not is_empty(state) and time.monotonic() < until:
        time.sleep(0.1)
    assert is_empty(state)


HOLDER = """
import os, sys, time
from advisor.probe.work import work_folder
with work_folder(sys.argv[1]) as folder:
    print(folder, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(state: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process with a folder that it works in."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, state / "running"],
        env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    yield process, Path(process.stdout.readline().strip())
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_folder_that_nobody_could_remove_is_removed_by_the_next_probe(
    state: Path, holder: tuple[subprocess.Popen[str], Path]
) -> None:
    process, left = holder
    process.kill()
    process.wait()
    assert left.is_dir()
    request = ProbeRequest(plan=small_plan(), architecture=SMALL, device="cpu")
    probe(request, ENVIRONMENT, timeout_seconds=0.2)
    assert not list((state / "running").iterdir())


def test_a_probe_of_another_container_that_shares_the_home_folder_keeps_its_folder(
    state: Path, holder: tuple[subprocess.Popen[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where process ids mean nothing: there this process is the only one that there is."""
    _, folder = holder
    monkeypatch.setattr(psutil, "pid_exists", lambda pid: pid == os.getpid())
    request = ProbeRequest(plan=small_plan(), architecture=SMALL, device="cpu")
    probe(request, ENVIRONMENT, timeout_seconds=0.2)
    assert sorted(path.name for path in (state / "running").iterdir()) == [folder.name, f"{folder.name}.lock"]


def test_a_measurement_survives_its_own_json() -> None:
    from advisor.probe.measurement import measurement_values

    found = run(small_plan(), steps=2, saves=False)
    assert measurement_of(measurement_values(found)) == replace(found, notes=tuple(found.notes))


def test_a_state_folder_that_takes_nothing_keeps_no_result_and_says_so(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    monkeypatch.setenv("PHI3_ADVISE_STATE", str(in_the_way))
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    found = measure(small_plan(), replace(subject, steps=2, saves=False))
    assert found.outcome == "ran", found.message
    assert "could not be kept" in found.notes[-1]
    assert list(temporary.iterdir()) == []
    monkeypatch.setattr(tempfile, "tempdir", str(in_the_way))
    with pytest.raises(EnvironmentLacksError, match="No probe can be started"):
        measure(small_plan(), subject)
