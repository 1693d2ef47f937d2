"""The closed form against the trace, over a sampled grid of plans.

    python tests/benchmarks/accuracy.py [--plans 500] [--extra 0] [--seed 0] [--workers 2] [--minutes 60]
                                        [--results accuracy.jsonl] [--write docs/accuracy.md]

Every plan is traced at its model's full depth. Results are appended as they come: run it again to go on where it
stopped. Errors are signed: above zero the closed form says more than the trace, below zero it says less.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

MODELS = ["phi-3.5-mini", "phi-3-medium-4k", "phi-4", "phi-4-mini", "llama-3.2-1b"]
LLAMA = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}
"""config.json of Llama-3.2-1B, the numbers that memory depends on: the architecture that is not Phi's."""

GPUS = ["t4", "rtx-4090", "a100-80gb", "h100"]
SEQ_LENS = [512, 1024, 2048, 4096, 8192]
MICRO_BATCHES = [1, 2, 4, 8, 16]
OPTIMIZERS = ["adamw_torch_fused", "adamw_torch", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit"]
LARGEST_TOKENS = 32_768
"""No micro-batch above this: nobody trains with more on one GPU, and the trace's own tensors stay small."""


def sample_plan(rng: random.Random) -> dict[str, Any]:
    """One plan of the grid, as the fields of a plan file."""
    method = rng.choice(["full", "lora", "qlora"])
    gpu = rng.choice(GPUS)
    half = "float16" if gpu == "t4" else "bfloat16"
    fields: dict[str, Any] = {"model": rng.choice(MODELS), "method": method, "gpu": gpu}
    fields["seq_len"] = rng.choice(SEQ_LENS)
    fields["micro_batch"] = rng.choice([n for n in MICRO_BATCHES if n * fields["seq_len"] <= LARGEST_TOKENS])
    fields["gradient_accumulation"] = rng.choice([1, 4])
    fields["dtype"] = "float32" if method == "full" and (gpu == "t4" or rng.random() < 0.2) else half
    fields["autocast"] = half if fields["dtype"] == "float32" and gpu == "t4" else rng.choice(["none", half])
    fields["gradient_checkpointing"] = rng.random() < 0.6
    fields["loss"] = rng.choice(["standard", "chunked"])
    fields["attention"] = rng.choice(["sdpa", "sdpa", "eager" if gpu == "t4" else "flash_attention_2", "eager"])
    if fields["attention"] == "flash_attention_2" and fields["dtype"] == "float32" and fields["autocast"] == "none":
        fields["attention"] = "sdpa"
    fields["optimizer"] = rng.choice(OPTIMIZERS)
    fields["padding"] = rng.choice(["none", "longest"])
    fields["hold_outputs"] = fields["loss"] == "standard" and rng.random() < 0.1
    if method != "full":
        targets = rng.choice(["all-linear", "all-linear", ["o_proj", "down_proj"]])
        fields["lora"] = {
            "rank": rng.choice([8, 16, 64]),
            "dropout": rng.choice([0.0, 0.05]),
            "target_modules": targets,
        }
    if method == "qlora":
        fields["upcast_frozen"] = rng.random() < 0.3
        fields["quantization"] = {"double": rng.random() < 0.7}
    return fields


def sample_extra(rng: random.Random) -> dict[str, Any]:
    """A plan of the grid whose rows are packed, whose weights are stepped in backward, or both."""
    fields = sample_plan(rng)
    steps = fields["method"] == "full" and fields["autocast"] != "float16" and rng.random() < 0.75
    if steps:
        fields |= {"optimizer_in_backward": True, "gradient_accumulation": 1}
    if not steps or rng.random() < 0.25:
        fields |= {"packing": True, "padding": "none"}
    return fields


def sample_plans(
    count: int, seed: int, sample: Callable[[random.Random], dict[str, Any]] = sample_plan
) -> list[dict[str, Any]]:
    """So many different plans; the first of a longer list are those of a shorter one."""
    rng, plans, seen = random.Random(seed), [], set()
    while len(plans) < count:
        fields = sample(rng)
        key = json.dumps(fields, sort_keys=True)
        if key not in seen:
            seen.add(key)
            plans.append(fields)
    return plans


def compare(fields: dict[str, Any]) -> dict[str, Any]:
    """Both numbers of one plan's training step, or why there is none."""
    import warnings

    from advisor.architecture import architecture_from_config
    from advisor.errors import AdvisorError
    from advisor.hardware import what_if
    from advisor.memory.estimate import estimate
    from advisor.memory.trace import hardware_of, trace
    from advisor.profiles import load_gpu, load_model, plan_with_defaults

    warnings.simplefilter("ignore")
    try:
        named = dict(fields)
        if named["model"] == "llama-3.2-1b":
            arch = architecture_from_config(LLAMA, origin="Llama-3.2-1B")
        else:
            arch = load_model(named["model"]).architecture
        gpu = what_if(load_gpu(named["gpu"]))
        plan = plan_with_defaults(named)
        said = estimate(plan, arch, gpu)
        start = time.perf_counter()
        traced = trace(plan, arch.config, gpu=hardware_of(gpu))
    except AdvisorError as error:
        return {"fields": fields, "refused": str(error)}
    return {
        "fields": fields,
        "estimate": said.allocated_bytes,
        "trace": traced.step_bytes,
        "estimate_reserved": said.reserved_bytes,
        "trace_reserved": traced.reserved_expandable_bytes if traced.expandable.failed_request_bytes is None else None,
        "estimate_at": said.at,
        "trace_at": traced.at,
        "seconds": round(time.perf_counter() - start, 1),
    }


def run(plans: list[dict[str, Any]], results: Path, workers: int, minutes: float) -> Iterator[dict[str, Any]]:
    """Everything that is known of the plans: what the file has, then what is computed now."""
    done = {}
    if results.exists():
        rows = [json.loads(line) for line in results.read_text().splitlines()]
        done = {json.dumps(row["fields"], sort_keys=True): row for row in rows}
    todo = [fields for fields in plans if json.dumps(fields, sort_keys=True) not in done]
    yield from (done[key] for key in (json.dumps(fields, sort_keys=True) for fields in plans) if key in done)
    end = time.monotonic() + 60 * minutes
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool, results.open("a") as file:
        waiting = {pool.submit(compare, fields) for fields in todo}
        try:
            for future in as_completed(waiting, timeout=max(1.0, end - time.monotonic())):
                row = future.result()
                file.write(json.dumps(row) + "\n")
                file.flush()
                yield row
        except TimeoutError:
            pool.shutdown(wait=False, cancel_futures=True)


def error(row: dict[str, Any], of: str = "") -> float:
    """The closed form's signed error."""
    return float(row[f"estimate{of}"] / row[f"trace{of}"] - 1)


def summarise(rows: list[dict[str, Any]]) -> list[str]:
    """The table: a line a method and a model."""
    lines = [
        "| plans | of | median error | 95th percentile | worst over | worst under |",
        "| ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    groups = {"all": rows}
    groups |= {method: [r for r in rows if r["fields"]["method"] == method] for method in ("full", "lora", "qlora")}
    groups["in backward"] = [row for row in rows if row["fields"].get("optimizer_in_backward")]
    groups["packed"] = [row for row in rows if row["fields"].get("packing")]
    groups |= {model: [r for r in rows if r["fields"]["model"] == model] for model in MODELS}
    for name, group in groups.items():
        if group:
            lines.append(summary_line(name, [error(row) for row in group]))
    surviving = [error(row, "_reserved") for row in rows if row["trace_reserved"] is not None]
    if surviving:
        lines.append(summary_line("reserved, where the GPU survives", surviving))
    return lines


def summary_line(name: str, errors: list[float]) -> str:
    """Median and 95th percentile of the absolute error, and the worst of each sign."""
    absolute = sorted(abs(e) for e in errors)
    percentile = absolute[min(len(absolute) - 1, int(0.95 * len(absolute)))]
    figures = f"{statistics.median(absolute):.2%} | {percentile:.2%} | {max(errors):+.2%} | {min(errors):+.2%}"
    return f"| {len(errors)} | {name} | {figures} |"


def page(rows: list[dict[str, Any]], refused: list[dict[str, Any]], seed: int) -> str:
    """docs/accuracy.md."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "bitsandbytes"))
    worst = sorted(rows, key=lambda row: -abs(error(row)))[:10]
    return "\n".join(
        [
            "# How far the closed form is from the trace",
            "",
            f"{len(rows)} plans sampled with seed {seed}, each traced at full depth under {packages}:",
            "peak allocated of the closed form against the trace's. Nothing here was measured on a GPU; the trace",
            "itself is held against real execution and against published measurements in `tests/memory/`.",
            "",
            "    python tests/benchmarks/accuracy.py --plans 500 --write docs/accuracy.md",
            "",
            *summarise(rows),
            "",
            f"Refused by either: {len(refused)}.",
            "",
            "## The ten furthest off",
            "",
            "| error | peak of the closed form | of the trace | plan |",
            "| ---: | --- | --- | --- |",
            *(
                f"| {error(row):+.2%} | {row['estimate_at']} | {row['trace_at']} | `{json.dumps(row['fields'])}` |"
                for row in worst
            ),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="The closed form against the trace.")
    parser.add_argument("--plans", type=int, default=500)
    parser.add_argument("--extra", type=int, default=0, help="plans that pack rows or step in backward")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--results", type=Path, default=Path("accuracy.jsonl"))
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    rows, refused = [], []
    plans = sample_plans(options.plans, options.seed) + sample_plans(options.extra, options.seed, sample_extra)
    for row in run(plans, options.results, options.workers, options.minutes):
        (refused if "refused" in row else rows).append(row)
        if "refused" not in row and abs(error(row)) > 0.01:
            print(
                f"{error(row):+.2%}  {row['estimate_at']} / {row['trace_at']}  {json.dumps(row['fields'])}", flush=True
            )
    for row in refused:
        print(f"refused: {row['refused']}  {json.dumps(row['fields'])}")
    print("\n".join(summarise(rows)))
    if options.write:
        options.write.write_text(page(rows, refused, options.seed))


if __name__ == "__main__":
    main()
