"""`python -m advisor.memory.trace plan.toml`: one JSON object on stdout."""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path
from typing import Any

from advisor.memory.kernels import Gpu
from advisor.memory.trace import Trace, trace
from advisor.plan import Plan, plan_from_fields, plan_to_fields

_SHOWN = 25


def main(path: str) -> None:
    """Trace the plan in a TOML file."""
    fields = tomllib.loads(Path(path).read_text())
    plan = plan_from_fields(fields)
    capability = (7, 5) if plan.gpu == "t4" else (8, 0)
    result = trace(plan, read_architecture(plan.model), gpu=Gpu(capability=capability))
    print(json.dumps(as_json(plan, result), indent=1))


def read_architecture(model: str) -> dict[str, Any]:
    """A profile of profiles/models or a config.json, by path or by the profile's name."""
    path = Path(model)
    if not path.exists():
        path = Path(__file__).parents[3] / "profiles" / "models" / f"{model}.toml"
    if path.suffix == ".json":
        values: dict[str, Any] = json.loads(path.read_text())
        return values
    architecture: dict[str, Any] = tomllib.loads(path.read_text())["architecture"]
    return architecture


def as_json(plan: Plan, result: Trace) -> dict[str, Any]:
    """The trace as plain values."""
    return {
        "schema": 1,
        "tier": "trace",
        "plan": plan_to_fields(plan),
        "parameters": {"total": result.total_parameters, "trainable": result.trainable_parameters},
        "memory": {
            "allocated_bytes": result.allocated_bytes,
            "reserved_bytes": result.reserved_bytes,
            "reserved_expandable_bytes": result.reserved_expandable_bytes,
            "at": result.at,
            "components": dict(result.components),
            "peaks": dict(result.peaks),
        },
        "largest": [
            {
                "bytes": allocation.nbytes,
                "shape": list(allocation.shape),
                "dtype": allocation.dtype,
                "component": allocation.component,
                "module": allocation.module,
                "operation": allocation.operation,
                "moment": allocation.moment,
            }
            for allocation in result.largest[:_SHOWN]
        ],
    }


if __name__ == "__main__":
    main(sys.argv[1])
