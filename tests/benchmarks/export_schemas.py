"""Exports against axolotl's and LLaMA-Factory's own parsers, which are too heavy to install for every test run.

    python tests/benchmarks/export_schemas.py axolotl|llama-factory [--write]

Run it in an environment that has the tool. axolotl's schema needs the package itself (pip install --no-deps axolotl)
beside torch, transformers, pillow, addict, colorama and art; LLaMA-Factory's (pip install --no-deps llamafactory) needs
omegaconf beside torch, transformers, peft and trl, and DISABLE_VERSION_CHECK=1 where those are newer than it allows.
`--write` stores the schema that tests/export/ holds every export against.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import json
import os
import sys
import tempfile
import types
import typing
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from export.plans import PLANS

from advisor.export import export_plan
from advisor.report.yaml import config_text

SCHEMAS = Path(__file__).resolve().parents[1] / "export" / "schemas"
_JSON = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}


def axolotl_schema() -> dict[str, Any]:
    from axolotl.utils.schemas.config import AxolotlInputConfig
    from pydantic.json_schema import GenerateJsonSchema

    class Generator(GenerateJsonSchema):
        """Some of axolotl's choices are torch dtypes, which JSON has no word for."""

        def enum_schema(self, schema: Any) -> dict[str, Any]:
            plain = all(isinstance(member.value, (str, int)) for member in schema["members"])
            return super().enum_schema(schema) if plain else {}

    schema: dict[str, Any] = _without_prose(AxolotlInputConfig.model_json_schema(schema_generator=Generator))
    return schema | {"additionalProperties": False}  # axolotl itself passes over what it does not know


def llama_factory_schema() -> dict[str, Any]:
    from llamafactory.hparams.parser import _TRAIN_ARGS

    properties = {}
    for kind in _TRAIN_ARGS:
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            if field.init:
                properties[field.name] = _type_schema(hints[field.name])
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _type_schema(hint: Any) -> dict[str, Any]:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_type_schema(part) for part in typing.get_args(hint)]}
    if origin is typing.Literal:
        return {"enum": list(typing.get_args(hint))}
    if hint is type(None):
        return {"type": "null"}
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return {"enum": [member.value for member in hint]}
    name = _JSON.get(origin or hint)
    return {"type": name} if name else {}


def _without_prose(value: Any) -> Any:
    """A schema without descriptions, titles, defaults and examples."""
    if isinstance(value, list):
        return [_without_prose(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    dropped = {"description", "title", "default", "examples", "deprecated"}
    kept = {}
    for name, inner in value.items():
        if name in ("properties", "$defs"):
            kept[name] = {key: _without_prose(part) for key, part in inner.items()}
        elif name not in dropped:
            kept[name] = _without_prose(inner)
    return kept


def parse_axolotl(path: str) -> None:
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    capabilities = {"bf16": True, "tf32": True, "n_gpu": 1, "compute_capability": "sm_90", "fp8": False}
    with open(path, encoding="utf-8") as file:
        settings = DictDefault(yaml.safe_load(file))
    validate_config(settings, capabilities=capabilities, env_capabilities={"torch_version": "2.13.0"})


def parse_llama_factory(path: str) -> None:
    from llamafactory.hparams import parser
    from transformers import HfArgumentParser

    with open(path, encoding="utf-8") as file:
        settings = yaml.safe_load(file)
    # The whole get_train_args also looks for a GPU, torchrun and a dataset: this is its parser and its own checks.
    model, data, _, finetuning, _ = HfArgumentParser(parser._TRAIN_ARGS).parse_dict(settings)
    parser._verify_model_args(model, data, finetuning)


def main() -> None:
    arguments = argparse.ArgumentParser(description="Exports against a tool's own schema and parser.")
    arguments.add_argument("tool", choices=["axolotl", "llama-factory"])
    arguments.add_argument("--write", action="store_true", help="store the schema for the tests")
    chosen = arguments.parse_args()
    axolotl = chosen.tool == "axolotl"
    package = "axolotl" if axolotl else "llamafactory"
    if chosen.write:
        schema = axolotl_schema() if axolotl else llama_factory_schema()
        source = f"{package} {version(package)}, written by tests/benchmarks/export_schemas.py {chosen.tool} --write"
        text = json.dumps({"$comment": source, **schema}, separators=(",", ":"), sort_keys=True)
        (SCHEMAS / f"{chosen.tool}.json").write_text(text + "\n", encoding="utf-8")
        print(f"{chosen.tool}.json: {len(text):,} bytes from {package} {version(package)}")
    import transformers.training_args

    # A machine without a GPU shall read configurations for one that has bfloat16.
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    parse = parse_axolotl if axolotl else parse_llama_factory
    failed = 0
    for name, plan in PLANS.items():
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "config.yaml")
            Path(path).write_text(config_text(export_plan(plan, chosen.tool)), encoding="utf-8")
            try:
                parse(path)
            except Exception as error:  # noqa: BLE001 - whatever the tool raises is the finding
                failed += 1
                print(f"FAILED  {name}: {type(error).__name__}: {str(error)[:1500]}")
            else:
                print(f"parsed  {name}")
    print(f"{len(PLANS) - failed} of {len(PLANS)} exports are taken by {package} {version(package)}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
