"""The data set that comes with the package: found by its name, well formed, and right about the figures it quotes."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from advisor.memory.resident import trained_elements
from advisor.plan import LoraSettings
from advisor.profiles import default_plan, load_gpu, load_model
from advisor.shipped_data import shipped_dataset, shipped_datasets
from advisor.units import GIB

NAME = "phi3-advise-qa"


def rows() -> list[list[dict[str, str]]]:
    path = shipped_dataset(NAME)
    assert path is not None
    return [json.loads(line)["messages"] for line in Path(path).read_bytes().decode("utf-8").splitlines()]


def is_japanese(text: str) -> bool:
    return any("\u3040" <= character <= "\u30ff" for character in text)


def test_it_is_found_by_its_name_and_by_nothing_else() -> None:
    assert NAME in shipped_datasets()
    for other in ("", "alpaca", f"{NAME}.jsonl", f"./{NAME}", "../models/phi-4", "owner/" + NAME):
        assert shipped_dataset(other) is None


def test_roles_alternate_and_every_turn_says_something() -> None:
    for messages in rows():
        roles = [message["role"] for message in messages]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2)
        assert turns
        assert all(message["content"].strip() == message["content"] != "" for message in messages)


def test_about_half_is_japanese_and_no_question_comes_twice() -> None:
    found = rows()
    assert len(found) == 300
    japanese = sum(is_japanese(messages[-1]["content"]) or is_japanese(messages[-2]["content"]) for messages in found)
    assert 0.4 < japanese / len(found) < 0.6
    questions = Counter(tuple(message["content"] for message in messages[:-1]) for messages in found)
    assert questions.most_common(1)[0][1] == 1
    answers = Counter(messages[-1]["content"] for messages in found if "phi3-advise" not in messages[-1]["content"])
    assert answers.most_common(1)[0][1] == 1


def test_the_figures_it_quotes_are_those_of_the_profiles() -> None:
    text = "\n".join(message["content"] for messages in rows() for message in messages)
    mini = load_model("phi-3-mini-4k").architecture
    medium = load_model("phi-3-medium-4k").architecture
    assert f"{mini.parameters:,}" in text
    for number in (mini.parameters * 2 / GIB, mini.parameters * 16 / GIB, mini.parameters * 8 / GIB):
        assert any(f"{number:.{digits}f} GiB" in text for digits in (1, 2)), number
    assert f"{2 * medium.parameters / GIB:.0f} GiB" in text
    for gpu in ("t4", "a100-40gb", "a100-80gb", "rtx-4090", "rtx-3090"):
        assert f"{load_gpu(gpu).usable_bytes / GIB:.2f}" in text


@pytest.mark.parametrize(("rank", "quoted"), [(16, 25_165_824), (64, 100_663_296)])
def test_the_adapter_counts_it_quotes_are_the_closed_form_s(rank: int, quoted: int) -> None:
    plan = replace(default_plan("lora", model="phi-3-mini-4k"), lora=LoraSettings(rank=rank))
    assert trained_elements(plan, load_model("phi-3-mini-4k").architecture) == quoted
    assert f"{quoted:,}" in "\n".join(message["content"] for messages in rows() for message in messages)
