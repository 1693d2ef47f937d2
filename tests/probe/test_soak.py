"""Ten probes of the soak, of which some are killed; tests/benchmarks/probe_soak.py runs 200."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[1] / "benchmarks" / "probe_soak.py"


@pytest.mark.skipif(os.name != "posix", reason="kill -9")
def test_nothing_is_left_behind_or_misjudged(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("probe_soak", SOAK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["probe_soak"] = module
    spec.loader.exec_module(module)
    verdicts, problems = module.soak(10, seed=2, workers=2, state=tmp_path)
    assert problems == []
    assert len(verdicts) == 10
    assert {"child", "parent"} <= {one.case.kill for one in verdicts}
