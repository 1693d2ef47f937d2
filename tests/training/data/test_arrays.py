"""Rows as arrays are the data set's rows, and make the same batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from advisor.plan import plan_from_fields
from advisor.training.data import ArrayRows, Collator, prepare_data


def prepared(tokenizer: Any, source: Path, packing: bool) -> Any:
    return prepare_data(
        str(source),
        tokenizer,
        seq_len=96,
        validation=0.2,
        seed=1,
        skip_bad_rows=False,
        packing=packing,
        context=4096,
    ).train


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.filterwarnings("error")  # torch warns of arrays that may not be written to
def test_arrays_hold_the_data_set_s_rows_and_make_the_same_batches(
    packing: bool, tokenizer: Any, tmp_path: Path
) -> None:
    source = tmp_path / "rows.jsonl"
    lines = [f'{{"prompt": "{"why " * n}?", "completion": "{"so " * (n + 1)}"}}' for n in range(20)]
    source.write_text("\n".join(lines) + "\n")
    dataset = prepared(tokenizer, source, packing)
    rows = ArrayRows(dataset)
    assert len(rows) == len(dataset) > 1
    for index, expected in enumerate(dataset):
        found = rows[index]
        assert {name: values.tolist() for name, values in found.items()} == {
            name: values for name, values in expected.items() if name != "length"
        }
    with pytest.raises(IndexError):
        rows[len(rows)]
    plan = plan_from_fields({"model": "small", "method": "full", "micro_batch": 2, "seq_len": 96, "packing": packing})
    collate = Collator(plan, 0)
    expected, found = collate([dataset[0], dataset[1]]), collate([rows[0], rows[1]])
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_nothing_is_copied(tokenizer: Any, tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text('{"prompt": "why?", "completion": "so"}\n' * 10)
    dataset = prepared(tokenizer, source, packing=False)
    held = dataset.data.column("input_ids").chunk(0).values.to_numpy()
    assert np.shares_memory(ArrayRows(dataset)[3]["input_ids"], held)
