"""What a trace found alive, in as few rows as say it: the same tensor of every layer is one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from advisor.memory.trace import Allocation

_NUMBER = re.compile(r"\b\d+\b")

_WRAPPER = "base_model.model."
"""What PEFT puts before the names of the model inside."""

_INSIDE_A_MODULE = re.compile(r"\.(?:base_layer|lora_[A-Za-z_]+|weight|bias)(?:\.|$)")
"""Where a name goes on to an adapter or a parameter of its module."""


class Kind(NamedTuple):
    """What the same tensor of every layer has in common; numbers in the names are stars."""

    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    component: str
    module: str
    operation: str

    @property
    def shape_text(self) -> str:
        """`"2 × 2048"`."""
        return " × ".join(map(str, self.shape)) or "scalar"


class TensorRow(NamedTuple):
    """Tensors of one kind that are alive together."""

    kind: Kind
    number: int
    module: str
    moment: str

    @property
    def total_bytes(self) -> int:
        """All of them."""
        return self.number * self.kind.nbytes


class ModuleRow(NamedTuple):
    """What is alive of one module, the same one of every layer taken together."""

    module: str
    number: int
    """Tensors."""

    total_bytes: int
    """What they take, as the allocator rounds."""


def kind_of(item: Allocation) -> Kind:
    """The kind that a tensor is of."""
    return Kind(item.nbytes, item.dtype, tuple(item.shape), item.component, starred(item.module), item.operation)


@lru_cache(maxsize=4096)
def starred(name: str) -> str:
    """`"model.layers.7.mlp"` → `"model.layers.*.mlp"`; `"backward of layer 7"` → `"backward of layer *"`."""
    return _NUMBER.sub("*", name)


def row_of(kind: Kind, members: Sequence[Allocation]) -> TensorRow:
    """A kind's row; one tensor keeps its own names."""
    module, moment = kind.module, starred(members[0].moment)
    if len({member.module for member in members}) == 1:
        module = members[0].module
    moments = {member.moment for member in members}
    if len(moments) == 1:
        moment = members[0].moment
    elif len({starred(name) for name in moments}) > 1:
        moment = "several moments"
    return TensorRow(kind, len(members), module, moment)


def group_tensors(alive: Iterable[Allocation]) -> list[TensorRow]:
    """Everything by kind, the most bytes first."""
    kinds: dict[Kind, list[Allocation]] = {}
    for item in alive:
        kinds.setdefault(kind_of(item), []).append(item)
    return sorted((row_of(kind, members) for kind, members in kinds.items()), key=lambda row: -row.total_bytes)


def group_modules(alive: Iterable[Allocation]) -> list[ModuleRow]:
    """Everything by module, the most bytes first; what belongs to none goes by its component."""
    sizes: dict[str, list[int]] = {}
    for item in alive:
        name = module_name(item.module)
        if not name or " " in name:  # a thread, say
            name = f"({item.component})"
        sizes.setdefault(name, []).append(item.size_bytes)
    rows = (ModuleRow(name, len(members), sum(members)) for name, members in sizes.items())
    return sorted(rows, key=lambda row: -row.total_bytes)


@lru_cache(maxsize=4096)
def module_name(name: str) -> str:
    """`"base_model.model.model.layers.7.mlp.down_proj.lora_A.default.weight"` → `"model.layers.*.mlp.down_proj"`."""
    inside = starred(without_wrapper(name))
    cut = _INSIDE_A_MODULE.search(inside)
    return inside[: cut.start()] if cut else inside


def without_wrapper(name: str) -> str:
    """A name as the model itself spells it: `"base_model.model.lm_head"` → `"lm_head"`."""
    return f"{name}.".removeprefix(_WRAPPER).removesuffix(".")
