"""Fixtures that more than one test file uses."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

_STUB = Path(__file__).parent / "nvml_stub" / "nvml_stub.c"
os.environ["PHI3_ADVISE_LANG"] = "en"  # what tests read is English, whatever the language of whoever runs them
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    # Workers whose products each take every core wait for one another: three times the time on two cores. Set in a
    # worker, and not in the process that starts them, whose number of cores they would inherit.
    _SHARE = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _SHARE)))
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's background; what tests start would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
_READ_BY_DETECTION = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")


@pytest.fixture(scope="session", autouse=True)
def _state_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What probes measured on this machine stays out of the tests, and theirs out of it."""
    folder = tmp_path_factory.mktemp("state")
    before = os.environ.get("PHI3_ADVISE_STATE")
    os.environ["PHI3_ADVISE_STATE"] = str(folder)
    yield
    if before is None:
        del os.environ["PHI3_ADVISE_STATE"]
    else:
        os.environ["PHI3_ADVISE_STATE"] = before


@pytest.fixture(scope="session")
def nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a freshly compiled libnvidia-ml.so.1."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("the NVML stub needs Linux and a C compiler")
    folder = tmp_path_factory.mktemp("nvml")
    flags = ["-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([compiler, *flags, "-o", folder / "libnvidia-ml.so.1", _STUB], check=True)
    return folder


@pytest.fixture
def nvml(nvml_library: Path) -> Callable[[str], dict[str, str]]:
    """`nvml("t4")` is the environment of a process whose NVML answers as that machine's.

    The cases are in nvml_stub.c. For the whole command: `subprocess.run([...], env=nvml("two_a100"))`.
    """

    def environment(case: str) -> dict[str, str]:
        paths = [str(nvml_library), os.environ.get("LD_LIBRARY_PATH", "")]
        inherited = {name: value for name, value in os.environ.items() if name not in _READ_BY_DETECTION}
        return {**inherited, "LD_LIBRARY_PATH": os.pathsep.join(filter(None, paths)), "NVML_STUB_CASE": case}

    return environment


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small Phi-3 and its real tokenizer; read only."""
    from small_model import make_small_model

    return make_small_model(tmp_path_factory.mktemp("model") / "small-phi3")


@pytest.fixture(scope="session")
def small_grouped_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with two key-value heads for four query heads."""
    from small_model import make_small_model

    return make_small_model(tmp_path_factory.mktemp("model") / "small-phi3-grouped", kv_heads=2)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 40 MB: one checkpoint of the small model has room, a second does not."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)
