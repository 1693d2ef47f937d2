"""A plan for `accelerate launch`: precision, compilation and the one process; the script decides everything else.

Source: accelerate/commands/config/config_args.py (ClusterConfig) of the release below.
"""

from __future__ import annotations

from advisor.export.draft import Draft, field_names
from advisor.plan import Autocast, Plan

CHECKED_AGAINST = "accelerate 1.15.0"
COMMANDS = ("accelerate launch --config_file {file} your_script.py",)

_PRECISION: dict[Autocast, str] = {"none": "no", "bfloat16": "bf16", "float16": "fp16"}


def describe(plan: Plan, draft: Draft) -> None:
    """Fills the draft; accelerate knows no model, no adapter, no optimizer and no batch."""
    draft.set("compute_environment", "LOCAL_MACHINE")
    draft.set("distributed_type", "NO", note="a plan is for one GPU")
    draft.set("num_processes", 1)
    draft.set("num_machines", 1)
    draft.set("mixed_precision", _PRECISION[plan.autocast], "autocast")
    draft.set("use_cpu", False)
    if plan.training.compile:
        draft.set("dynamo_config", {"dynamo_backend": "INDUCTOR"}, "training.compile")
    else:
        draft.keep("training.compile", "nothing is compiled unless dynamo_config says so")
    told = {"autocast", "training.compile"}
    for name in field_names(plan):
        if name not in told:
            draft.lose(name, "your script's business")
