"""Rows of a data set on the hub."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from advisor.errors import EnvironmentLacksError, InputError, first_line
from advisor.training.data.rows import Place, RawRow
from advisor.training.data.samples import columns_of
from advisor.training.data.source import HubDataset

_BATCH = 1000


def read_hub(dataset: HubDataset) -> Iterator[RawRow]:
    """The rows of its training split, from the local cache or the hub.

    Raises:
        InputError: there is no such data set, configuration or split.
        EnvironmentLacksError: the hub cannot be reached and nothing is cached.
    """
    table = _load(dataset)
    if read := columns_of(table.column_names):
        table = table.select_columns(read)  # others may hold images or sound, which would be decoded
    number = 0
    for start in range(0, len(table), _BATCH):
        columns = table[start : start + _BATCH]
        for values in zip(*columns.values(), strict=True):
            number += 1
            place = Place(file=dataset.id, number=number, unit="row")
            yield RawRow(place, dict(zip(columns, values, strict=True)))


def _load(dataset: HubDataset) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        splits = load_dataset(dataset.id, dataset.config)
    except DatasetNotFoundError as error:
        raise InputError(
            f"There is no data set {dataset.id} on the hub, or it is not open to you.",
            why=first_line(error),
            hint="Check its name; for a gated one accept its terms and run: hf auth login",
        ) from error
    except ValueError as error:  # datasets' own, for a configuration or file it cannot make sense of
        raise InputError(
            f"The data set {dataset.id} cannot be loaded.",
            why=first_line(error),
            hint=f"If it has several configurations, write {dataset.id}:NAME.",
        ) from error
    except (OSError, RuntimeError) as error:  # every failure to connect is an OSError, requests' and httpx's too
        raise _unreachable(dataset, error) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] in ("httpx", "huggingface_hub", "httpcore"):
            raise _unreachable(dataset, error) from error
        raise
    if "train" in splits:
        return splits["train"]
    if len(splits) == 1:
        return next(iter(splits.values()))
    raise InputError(
        f"The data set {dataset.id} has no split called train.", why=f"Its splits are {', '.join(map(str, splits))}."
    )


def _unreachable(dataset: HubDataset, error: Exception) -> EnvironmentLacksError:
    return EnvironmentLacksError(
        f"The data set {dataset.id} cannot be reached.",
        why=first_line(error),
        hint="Go online once to fill the cache, or give a local file.",
    )
