"""What `import advisor` offers, and that it costs nothing until it is used."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata

import pytest

import advisor

PUBLIC = [
    "Advice",
    "AdvisorError",
    "Plan",
    "advise",
    "detect",
    "estimate",
    "load_gpu",
    "load_model",
    "load_plan",
]

HEAVY = {
    "accelerate",
    "bitsandbytes",
    "click",
    "datasets",
    "numpy",
    "peft",
    "psutil",
    "pynvml",
    "rich",
    "torch",
    "transformers",
}


def modules_after(statement: str) -> set[str]:
    """Names in sys.modules of a new process that ran the statement."""
    program = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return set(json.loads(done.stdout))


def test_public_names_are_these() -> None:
    assert advisor.__all__ == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_can_be_used_and_is_listed(name: str) -> None:
    assert callable(getattr(advisor, name))
    assert name in dir(advisor)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'advisor' has no attribute 'advice'"):
        _ = advisor.advice


def test_importing_the_package_loads_no_other_module_of_it() -> None:
    loaded = modules_after("import advisor")
    assert {name for name in loaded if name.startswith("advisor")} == {"advisor"}
    assert not loaded & HEAVY


def test_loading_every_public_name_loads_nothing_heavy() -> None:
    assert not modules_after("from advisor import *") & HEAVY


def test_advise_is_the_function_even_after_its_module_was_imported() -> None:
    assert "advisor.advise" in modules_after("import advisor.advise\nassert callable(advisor.advise)")


def test_the_version_is_the_distributions() -> None:
    assert metadata.version("phi3-advise") == advisor.__version__
