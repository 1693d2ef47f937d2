"""The fixed grid of plans that a campaign measures: a line of words each, which is also the plan's name.

    method model micro-batch×tokens [words]

A plan is its method's default recipe with what the words change. What the words are, `_WORDS` says.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Sdpa = Literal["flash", "efficient"]

MODELS = {
    "mini-4k": "phi-3-mini-4k",
    "mini-128k": "phi-3-mini-128k",
    "medium-4k": "phi-3-medium-4k",
    "medium-128k": "phi-3-medium-128k",
    "phi-4-mini": "phi-4-mini",
}
"""The 4k models have a window of 2,047 tokens: from there on a mask is made, and flash attention is out."""

_WORDS: Mapping[str, Mapping[str, Any]] = {
    "fp16": {"half": "float16"},
    "no-autocast": {"autocast": "none"},
    "mixed": {"dtype": "float32", "mixed": True},
    "no-checkpointing": {"gradient_checkpointing": False},
    "chunked": {"loss": "chunked"},
    "eager": {"attention": "eager"},
    "foreach": {"optimizer": "adamw_torch"},
    "8bit": {"optimizer": "adamw_bnb_8bit"},
    "paged-8bit": {"optimizer": "paged_adamw_8bit"},
    "paged-32bit": {"optimizer": "paged_adamw_32bit"},
    "padded": {"padding": "longest"},
    "packed": {"packing": True},
    "in-backward": {"optimizer_in_backward": True},
    "accumulated": {"gradient_accumulation": 4},
    "upcast": {"upcast_frozen": True},
    "single-quantised": {"quantization": {"double": False}},
    "rank-64": {"lora": {"rank": 64}},
    "dropout": {"lora": {"dropout": 0.05}},
}
_BACKENDS: Mapping[str, Sdpa] = {"flash": "flash", "efficient": "efficient"}

GRID = """
lora mini-4k 2×1024
qlora mini-4k 2×1024
full mini-4k 2×1024
full mini-4k 7×128 mixed eager paged-32bit accumulated
lora mini-4k 8×512 no-checkpointing dropout accumulated
qlora mini-4k 8×512 upcast dropout accumulated
lora mini-128k 2×2048
lora mini-128k 2×2048 no-autocast
lora mini-128k 2×2048 flash
lora mini-128k 2×2048 efficient
lora mini-128k 2×2048 padded
lora mini-128k 2×2048 packed
lora mini-128k 2×2048 chunked
lora mini-128k 2×2048 foreach rank-64
lora mini-128k 2×2048 fp16 efficient
lora mini-4k 2×2048
lora mini-4k 1×4096 chunked
lora mini-128k 1×8192 chunked
lora mini-128k 1×8192 flash
lora mini-128k 1×512
lora mini-128k 16×512
lora mini-128k 16×1024 chunked flash
lora mini-128k 4×2048 padded chunked accumulated
lora mini-128k 1×2048 no-checkpointing
lora mini-128k 2×2048 no-checkpointing chunked flash
lora mini-128k 1×1024 no-checkpointing eager
lora mini-128k 4×1024 fp16 padded 8bit
lora mini-128k 2×4096 packed chunked accumulated
qlora mini-128k 2×2048
qlora mini-128k 2×2048 no-autocast
qlora mini-128k 2×2048 fp16 efficient
qlora mini-128k 2×2048 padded
qlora mini-128k 2×2048 single-quantised
qlora mini-128k 2×2048 upcast
qlora mini-128k 1×512 fp16 efficient chunked
qlora mini-128k 1×512
qlora mini-128k 16×512 padded paged-8bit
qlora mini-128k 1×8192 chunked paged-32bit
qlora mini-128k 4×1024 no-checkpointing flash
qlora mini-128k 1×2048 no-checkpointing fp16 efficient
qlora mini-128k 8×2048 chunked 8bit accumulated
qlora mini-128k 4×2048 packed
full mini-128k 2×2048
full mini-128k 2×2048 foreach
full mini-128k 2×2048 8bit
full mini-128k 2×2048 paged-8bit
full mini-128k 2×2048 chunked in-backward
full mini-128k 1×2048 no-checkpointing flash
full mini-128k 4×2048 padded 8bit chunked
full mini-128k 1×1024 in-backward foreach
full mini-128k 1×8192 chunked 8bit
full mini-128k 16×512 chunked 8bit accumulated
full mini-128k 2×2048 packed chunked paged-8bit
full mini-128k 1×512 mixed fp16 8bit efficient
full mini-128k 2×1024 mixed 8bit padded
lora medium-4k 1×1024
lora medium-4k 1×4096 chunked
lora medium-128k 2×2048
lora medium-128k 1×2048 efficient
lora medium-128k 1×512 no-checkpointing
lora medium-128k 4×1024 padded chunked
lora medium-128k 1×8192 chunked flash 8bit
lora medium-128k 2×1024 fp16 accumulated
lora medium-128k 2×2048 packed paged-8bit
qlora medium-4k 2×1024
qlora medium-128k 1×2048
qlora medium-128k 1×2048 upcast
qlora medium-128k 1×1024 fp16 efficient
qlora medium-128k 2×1024 no-checkpointing flash
qlora medium-128k 16×512 chunked accumulated
qlora medium-128k 1×8192 chunked paged-32bit
qlora medium-128k 4×2048 padded 8bit
full medium-128k 1×512 in-backward 8bit chunked
full medium-128k 1×2048 in-backward 8bit
lora phi-4-mini 2×2048
lora phi-4-mini 2×2048 chunked padded
lora phi-4-mini 1×4096 no-checkpointing chunked flash
lora phi-4-mini 1×8192 chunked packed
lora phi-4-mini 8×512 fp16 efficient
qlora phi-4-mini 2×2048
qlora phi-4-mini 1×1024 no-checkpointing
qlora phi-4-mini 4×1024 fp16 padded chunked
qlora phi-4-mini 16×1024 chunked flash paged-8bit
qlora phi-4-mini 1×8192 8bit accumulated
full phi-4-mini 1×2048
full phi-4-mini 2×1024 chunked 8bit
full phi-4-mini 1×4096 chunked in-backward
full phi-4-mini 1×1024 padded foreach
full phi-4-mini 4×512 no-checkpointing 8bit
"""

_SHAPE = re.compile(r"(\d+)×(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One plan to measure."""

    name: str
    """Its line of the grid."""

    fields: Mapping[str, Any]
    """Of a plan file, over the method's defaults."""

    sdpa: Sdpa | None = None
    """The kernel that scaled dot-product attention is held to; None leaves it to torch."""

    @property
    def settings(self) -> frozenset[tuple[str, Any]]:
        """What coverage is counted in: each setting with its value, those left out too."""
        fields = self.fields
        lora = fields.get("lora", {})
        values: dict[str, Any] = {name: None for word in _WORDS.values() for name in word if name not in _TABLES}
        values |= {name: value for name, value in fields.items() if name not in _TABLES}
        values["model"] = fields["model"].removesuffix("-4k").removesuffix("-128k")
        values["half"] = "float16" if "float16" in (fields.get("dtype"), fields.get("autocast")) else "bfloat16"
        values["rank"], values["dropout"] = lora.get("rank"), lora.get("dropout")
        values["single"] = fields.get("quantization") is not None
        return frozenset({*values.items(), ("sdpa", self.sdpa)})


_TABLES = {"lora", "quantization", "mixed"}


def grid() -> tuple[Case, ...]:
    """Every case, in the order of the lines."""
    return tuple(case_of(line) for line in GRID.split("\n") if line)


def case_of(line: str) -> Case:
    """A line of the grid.

    Raises:
        ValueError: a word that means nothing, or one twice.
    """
    method, model, shape, *words = line.split(" ")
    found = _SHAPE.fullmatch(shape)
    unknown = [word for word in words if word not in _WORDS and word not in _BACKENDS]
    if found is None or model not in MODELS or unknown or len(set(words)) != len(words):
        raise ValueError(f"{line!r} is no line of the grid: {unknown or shape}")
    fields: dict[str, Any] = {"model": MODELS[model], "method": method, "gradient_accumulation": 1}
    fields |= {"micro_batch": int(found[1]), "seq_len": int(found[2])}
    for word in words:
        for name, value in _WORDS.get(word, {}).items():
            fields[name] = {**fields.get(name, {}), **value} if isinstance(value, dict) else value
    half, mixed = fields.pop("half", "bfloat16"), fields.pop("mixed", False)
    if half == "float16":
        fields.setdefault("dtype", half)
    if mixed or half == "float16":
        fields["autocast"] = half
    sdpa = next((_BACKENDS[word] for word in words if word in _BACKENDS), None)
    return Case(name=line, fields=fields, sdpa=sdpa)


__all__ = ["GRID", "MODELS", "Case", "Sdpa", "case_of", "grid"]
