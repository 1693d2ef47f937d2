"""The notebook for Colab: what its file holds, and every cell executed, on the processor with a small model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import nbformat
import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
NOTEBOOK = REPOSITORY / "docs" / "colab_t4.ipynb"
SWITCH = "TRY = None"
MOST_LINES = 8
LONGEST_LINE = 120
PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes")

pytestmark = pytest.mark.xdist_group("colab")


def read_notebook() -> Any:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    return notebook


def test_it_has_six_short_cells() -> None:
    cells = read_notebook().cells
    assert [cell.id for cell in cells] == ["install", "advise", "probe", "launch", "generate", "next"]
    for cell in cells:
        lines = cell.source.splitlines()
        assert len(lines) <= MOST_LINES
        assert max(map(len, lines)) <= LONGEST_LINE


def test_it_is_committed_without_outputs_or_traces_of_a_machine() -> None:
    notebook = read_notebook()
    assert [(cell.outputs, cell.execution_count, cell.metadata) for cell in notebook.cells] == [([], None, {})] * 6
    # Colab gives a notebook the GPU that its metadata asks for.
    assert notebook.metadata == {
        "accelerator": "GPU",
        "colab": {"gpuType": "T4"},
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert not re.search(r"/(home|root|Users|tmp|content|work)/", NOTEBOOK.read_text(encoding="utf-8"))


def test_one_switch_moves_it_to_the_processor() -> None:
    sources = [cell.source for cell in read_notebook().cells]
    assert sources[0].splitlines()[1].startswith(SWITCH)
    assert sum(source.count("cuda") for source in sources) == 1
    assert sum(source.count("phi-3-mini-4k") for source in sources) == 1


def test_it_installs_nothing_that_colab_has() -> None:
    """Every lower bound is met by Colab's image of August 2026, except for bitsandbytes, which it lacks.

    Source: googlecolab/backend-info, pip-freeze.gpu.txt, 19 August 2026.
    """
    import tomllib

    from packaging.requirements import Requirement

    colab = {
        "torch": "2.11.0+cu128",
        "transformers": "5.15.0",
        "peft": "0.20.0",
        "accelerate": "1.14.0",
        "datasets": "4.0.0",
        "rich": "13.9.4",
        "click": "8.4.2",
        "psutil": "5.9.5",
        "nvidia-ml-py": "13.610.43",
        "platformdirs": "4.11.3",
    }
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = [Requirement(text) for text in project["dependencies"]]
    missing = {
        need.name for need in needed if need.name not in colab or not need.specifier.contains(colab[need.name], True)
    }
    assert missing == {"bitsandbytes"}


def versions(python: Path) -> dict[str, str]:
    """What a Python finds installed, and where."""
    ask = (
        "import importlib.metadata as m, json, sys;"
        "print(json.dumps({n: f'{m.version(n)} {m.distribution(n).locate_file(str())}' for n in sys.argv[1:]}))"
    )
    found: dict[str, str] = json.loads(subprocess.check_output([python, "-c", ask, *PACKAGES], text=True))
    return found


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment without phi3-advise; the packages installed here are behind it, as Colab's own are."""
    folder = tmp_path_factory.mktemp("colab")
    venv.create(folder / "python")
    (site_packages,) = (folder / "python").glob("lib/*/site-packages")
    behind = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site_packages / "behind.pth").write_text("\n".join(behind), encoding="utf-8")
    kernel = folder / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    command = [str(folder / "python" / "bin" / "python"), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": command, "display_name": "Python 3", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec), encoding="utf-8")
    work = folder / "content"
    work.mkdir()
    (work / "phi3-advise").symlink_to(REPOSITORY)
    return folder


@pytest.fixture(scope="module")
def executed(machine: Path, small_model: Path) -> dict[str, str]:
    """What each cell printed, with the switch set."""
    from nbclient import NotebookClient

    notebook = read_notebook()
    notebook.cells[0].source = notebook.cells[0].source.replace(SWITCH, f"TRY = {str(small_model)!r}", 1)
    python = machine / "python" / "bin"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(machine / "jupyter"))
        patch.setenv("PATH", os.pathsep.join([str(python), os.environ["PATH"]]))
        patch.delenv("PYTHONPATH", raising=False)
        patch.setenv("PHI3_ADVISE_STATE", str(machine / "state"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("PIP_NO_INDEX", "1")
        patch.setenv("PIP_NO_BUILD_ISOLATION", "0")  # pip's own spelling of "without isolation"
        before = versions(python / "python")
        client = NotebookClient(
            notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(machine / "content")}}
        )
        client.execute()
        assert versions(python / "python") == before
    kept = os.environ.get("PHI3_ADVISE_EXECUTED")
    if kept is not None:  # to look at it: jupyter nbconvert --to html
        nbformat.write(notebook, kept)
    return {cell.id: printed(cell) for cell in notebook.cells}


def printed(cell: Any) -> str:
    """A cell's output as plain text; an exception is raised by nbclient already."""
    text = "".join(output.get("text", "") for output in cell.outputs)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def test_installing_leaves_torch_and_the_rest_alone(machine: Path, executed: dict[str, str]) -> None:
    assert "ERROR" not in executed["install"]
    (site_packages,) = (machine / "python").glob("lib/*/site-packages")
    installed = {path.name.partition("-")[0] for path in site_packages.glob("*.dist-info")}
    assert installed - {"pip", "setuptools"} == {"phi3_advise"}


def test_the_methods_are_compared(executed: dict[str, str]) -> None:
    assert "Recommended: full fine-tuning." in executed["advise"]


def test_the_recommendation_is_probed(executed: dict[str, str]) -> None:
    assert "Runs. It ran" in executed["probe"]


def test_the_shipped_data_set_is_trained_on(machine: Path, executed: dict[str, str]) -> None:
    assert "285 to train on, 15 held out" in executed["launch"]
    assert "Trained: " in executed["launch"]
    result = json.loads((machine / "content" / "run" / "result.json").read_text(encoding="utf-8"))
    assert result["outcome"] == "finished"
    assert result["final_loss"] < result["first_loss"]


def test_a_cell_s_output_is_plain_lines(executed: dict[str, str]) -> None:
    """A cell shows whatever is printed below what was printed before: nothing may be drawn again and again."""
    for name in ("advise", "probe", "launch", "next"):
        assert "\r" not in executed[name].replace("\r\n", "\n")
    assert executed["probe"].count("Probing: step 1\r\n") == 1
    steps = [line for line in executed["launch"].splitlines() if line.startswith("step ")]
    assert 2 <= len(steps) <= 19
    assert all(re.match(r"step \d+/19 · loss \d", line) for line in steps)


def test_what_was_trained_answers(executed: dict[str, str]) -> None:
    _, _, answer = executed["generate"].partition("Why does full fine-tuning not fit on a T4?")
    assert answer.strip()


def test_what_comes_next_runs(executed: dict[str, str]) -> None:
    assert "Tier: trace" in executed["next"]
    assert "# trl sft --config trl.yaml" in executed["next"]
