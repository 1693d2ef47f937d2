"""What is shipped: the profiles travel with every way to install, and what is installed is what was tested."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parent.parent
PROFILES = {
    path.relative_to(REPOSITORY / "profiles").as_posix()
    for kind in ("models", "gpus", "recipes", "datasets")
    for path in (REPOSITORY / "profiles" / kind).iterdir()
}

# The wheels are built once, by the one worker that runs this group.
pytestmark = pytest.mark.xdist_group("package")


def test_what_a_group_shares_is_made_once(request: pytest.FixtureRequest) -> None:
    # Where xdist groups, it says so in the name; where it does not, nothing fails and CI takes twice as long.
    if "PYTEST_XDIST_WORKER" not in os.environ:
        pytest.skip("one process runs all of it")
    assert request.node.nodeid.endswith("@package")


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed:
    """A virtual environment with the package in it, and the folder that its profiles should come from."""

    python: Path
    profiles: Path

    def run(self, *command: str | Path) -> str:
        """What the command prints, run from `/`, where no checkout is in reach."""
        done = subprocess.run(command, cwd="/", env=clean_environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def build_wheel(source: Path, folder: Path) -> Path:
    """A wheel of a checkout or an sdist, built with what is installed here: no network, no isolation."""
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--quiet"]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", folder, source], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(REPOSITORY, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def wheel_from_sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder], cwd=REPOSITORY, check=True
    )
    (sdist,) = folder.glob("*.tar.gz")
    return build_wheel(sdist, tmp_path_factory.mktemp("wheel-from-sdist"))


def install(folder: Path, *target: str | Path) -> Path:
    """The Python of a new virtual environment that has the target, and sees the packages installed here behind it."""
    venv.create(folder)
    python = folder / "bin" / "python"
    site_packages = Path(
        subprocess.check_output(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        ).strip()
    )
    behind = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site_packages / "behind.pth").write_text("\n".join(behind), encoding="utf-8")
    # --ignore-installed, or pip would look at the package that is under test here and leave it at that.
    options = ["--ignore-installed", "--no-build-isolation", "--no-deps", "--no-index", "--quiet"]
    subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", *options, *target], check=True)
    return python


@pytest.fixture(scope="module", params=["wheel", "wheel_from_sdist", "editable"])
def installed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("installed")
    if request.param == "editable":
        return Installed(python=install(folder, "--editable", REPOSITORY), profiles=REPOSITORY / "profiles")
    python = install(folder, request.getfixturevalue(request.param))
    (package,) = folder.glob("lib/*/site-packages/advisor")
    return Installed(python=python, profiles=package / "_profiles")


@pytest.mark.parametrize("which", ["wheel", "wheel_from_sdist"])
def test_a_wheel_holds_every_profile_and_no_tests(which: str, request: pytest.FixtureRequest) -> None:
    with zipfile.ZipFile(request.getfixturevalue(which)) as archive:
        names = set(archive.namelist())
    assert PROFILES
    assert {name.removeprefix("advisor/_profiles/") for name in names} >= PROFILES
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"advisor"}
    assert "advisor/py.typed" in names
    parts = {path.name for path in (REPOSITORY / "advisor" / "report" / "parts").iterdir()}
    assert {f"advisor/report/parts/{part}" for part in parts} <= names
    assert not [name for name in names if "test" in name]


def test_both_wheels_are_the_same(wheel: Path, wheel_from_sdist: Path) -> None:
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(wheel_from_sdist) as other:
        assert {name: one.read(name) for name in one.namelist()} == {
            name: other.read(name) for name in other.namelist()
        }


def test_profiles_are_found_from_another_directory(installed: Installed) -> None:
    found = installed.run(
        installed.python, "-c", "from advisor.profiles import profile_folder; print(profile_folder('gpus'))"
    )
    assert Path(found.strip()) == installed.profiles / "gpus"


def test_the_data_set_is_found_from_another_directory(installed: Installed) -> None:
    find = "from advisor.shipped_data import shipped_dataset; print(shipped_dataset('phi3-advise-qa'))"
    found = Path(installed.run(installed.python, "-c", find).strip())
    assert found == installed.profiles / "datasets" / "phi3-advise-qa.jsonl"
    assert found.is_file()


@pytest.mark.parametrize("program", ["script", "module"])
def test_advice_from_another_directory_is_json(installed: Installed, program: str) -> None:
    command = [installed.python, "-m", "advisor"] if program == "module" else [installed.python.parent / "phi3-advise"]
    answer = json.loads(installed.run(*command, "--gpu", "t4", "--json"))
    assert answer["schema"] == 1
    assert {method["method"] for method in answer["methods"]} == {"full", "lora", "qlora"}


def test_every_dependency_is_pinned_within_its_bounds() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {
        canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines) if version
    }
    required = [Requirement(text) for text in (*project["dependencies"], *project["optional-dependencies"]["test"])]
    unpinned = {
        str(requirement)
        for requirement in required
        if not requirement.specifier.contains(pins.get(canonicalize_name(requirement.name), "0"))
    }
    assert unpinned == {"pip>=23"}, "pip is what installs: it is whatever is there"


def test_the_readme_and_ci_install_what_was_tested() -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()
    install_and = "python3 -m venv .venv && .venv/bin/pip install -c constraints.txt"
    commands = [line for line in readme if line.startswith("python3 -m venv")]
    assert commands == [
        f"{install_and} . && .venv/bin/phi3-advise",
        f"{install_and} -e '.[test]' && .venv/bin/pytest",
    ]
    # .ci/run takes its command from the README by this pattern.
    assert r"grep -E '^python3 -m venv \.venv && .*/pytest$' README.md" in (REPOSITORY / ".ci/run").read_text("utf-8")
