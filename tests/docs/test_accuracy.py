"""docs/accuracy.md is of the plans that its command samples, and what it lists still comes out."""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from accuracy import MODELS, compare, error, sample_extra, sample_plans

TEXT = (Path(__file__).parents[2] / "docs" / "accuracy.md").read_text(encoding="utf-8")
LISTED = [
    (said, *moments, json.loads(fields))
    for said, *moments, fields in re.findall(r"^\| ([-+][\d.]+%) \| (.*?) \| (.*?) \| `(.*)` \|$", TEXT, re.MULTILINE)
]


def sampled() -> list[dict[str, Any]]:
    found = re.search(r"--plans (\d+)(?: --extra (\d+))?", TEXT)
    assert found
    return sample_plans(int(found[1]), 0) + sample_plans(int(found[2] or 0), 0, sample_extra)


def test_its_groups_are_those_of_the_sample() -> None:
    plans = sampled()
    said = {name: int(number) for number, name in re.findall(r"^\| (\d+) \| (\S+) \|", TEXT, re.MULTILINE)}
    refused = re.search(r"Refused by either: (\d+)\.", TEXT)
    assert refused
    assert said["all"] == len(plans) - int(refused[1])
    if not int(refused[1]):
        for field, names in (("method", ("full", "lora", "qlora")), ("model", tuple(MODELS))):
            assert {name: said[name] for name in names} == {
                name: sum(plan[field] == name for plan in plans) for name in names
            }
    assert len(LISTED) == 10
    assert any(fields["model"] in SMALL for *_, fields in LISTED), "none would come out again below"
    assert all(fields in plans for *_, fields in LISTED)


SMALL = ("llama-3.2-1b", "phi-3.5-mini")


@pytest.mark.parametrize("row", [row for row in LISTED if row[-1]["model"] in SMALL], ids=lambda row: row[0])
def test_what_it_lists_comes_out_again(row: tuple[str, str, str, dict[str, Any]]) -> None:
    """The smaller models', which trace in seconds."""
    made_with = dict(re.findall(r"(torch|transformers|peft|bitsandbytes) ([\w.+]+)", TEXT))
    if any(version(name).partition("+")[0] != made.partition("+")[0] for name, made in made_with.items()):
        pytest.skip("the page was made with other versions")
    said, estimate_at, trace_at, fields = row
    found = compare(fields)
    assert (f"{error(found):+.2%}", found["estimate_at"], found["trace_at"]) == (said, estimate_at, trace_at)
