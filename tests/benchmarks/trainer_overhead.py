"""What our trainer costs a step over a bare PyTorch loop: the same model, batches, loss and optimizer.

    OMP_NUM_THREADS=1 python tests/benchmarks/trainer_overhead.py [--method lora] [--pairs 7] [--steps 12]

Runs alternate, because a machine's speed drifts; the ratio is the median over pairs of (our steps) ÷ (the loop's).
Two clocks: the wall's, and the processor time of this process, which other programs on the machine disturb less.
Ours logs every step to metrics.jsonl, reads the gradient norm, and shows progress; the loop does what a step has to:
forward, backward, clip, step, schedule, zero_grad, and one reading of the loss. The bound is 3 %.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.utils.data import SequentialSampler
from transformers import get_scheduler
from transformers.utils import logging as transformers_logging

from advisor.plan import Plan, plan_from_fields
from advisor.report.terminal.training import TrainingDisplay
from advisor.training.build import build_model, build_optimizer
from advisor.training.data import Collator
from advisor.training.interruption import Interruption
from advisor.training.metrics import Metrics
from advisor.training.monitor import Monitor, Saving
from advisor.training.session import say_how_it_is_quantised
from advisor.training.step import MAX_GRADIENT_NORM
from advisor.training.trainer import PlanTrainer, training_arguments

PHI3: dict[str, Any] = {
    "model_type": "phi3",
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "lora": {"method": "lora", "lora": {"rank": 16}},
    "qlora": {"method": "qlora", "lora": {"rank": 16}, "quantization": {}},
}
Times = tuple[float, float]
WARM_UP = 2
"""Steps that are not timed: optimizer states are made, kernels are picked."""


def now() -> Times:
    """Seconds on the wall and of the processor."""
    return time.perf_counter(), time.process_time()


def since(began: Times, ended: Times) -> Times:
    """Seconds between two of them."""
    return ended[0] - began[0], ended[1] - began[1]


class InOrder(SequentialSampler):
    """The rows as they are."""

    def set_epoch(self, epoch: int) -> None:
        """All epochs are alike."""


class Clock(Monitor):
    """Ours, which remembers when each step ended, and saves nothing: a loop would not either."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.ends: list[Times] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The step before has been logged by now."""
        super().on_step_end(args, state, control, **kwargs)
        control.should_save = False
        self.ends.append(now())


def make_rows(plan: Plan, steps: int) -> list[dict[str, list[int]]]:
    """Full rows, enough for every step."""
    torch.manual_seed(0)
    tokens = torch.randint(3, PHI3["vocab_size"], (plan.effective_batch * steps, plan.seq_len)).tolist()
    return [{"input_ids": row, "labels": row} for row in tokens]


def time_ours(plan: Plan, rows: list[dict[str, list[int]]], steps: int) -> Times:
    """Seconds of the timed steps of `PlanTrainer`."""
    torch.manual_seed(0)
    built = build_model(plan, PHI3, "cpu")
    if plan.quantization is not None:
        say_how_it_is_quantised(built, plan)
    saving = Saving(None)
    with (
        tempfile.TemporaryDirectory() as folder,
        Metrics(Path(folder) / "metrics.jsonl") as metrics,
        open(Path(folder) / "screen", "w", encoding="utf-8") as screen,
    ):
        display = TrainingDisplay(Console(file=screen), steps=steps)
        clock = Clock(
            device=torch.device("cpu"),
            metrics=metrics,
            interruption=Interruption(lambda _: None),
            saving=saving,
            show=display.update,
            advice="",
        )
        trainer = PlanTrainer(
            plan=plan,
            built=built,
            args=training_arguments(plan, Path(folder), device="cpu", evaluates=False),
            train=rows,
            validation=None,
            order=InOrder(rows),
            collator=Collator(plan, 0),
            pad_token_id=0,
            monitor=clock,
            saving=saving,
        )
        with display:
            trainer.train()
    return since(clock.ends[WARM_UP - 1], clock.ends[-1])


def time_loop(plan: Plan, rows: list[dict[str, list[int]]], steps: int) -> Times:
    """Seconds of the same steps in a loop as a person would write it."""
    torch.manual_seed(0)
    built = build_model(plan, PHI3, "cpu")
    model, optimizer = built.model, build_optimizer(plan, built.model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    schedule = get_scheduler(plan.training.schedule, optimizer, num_warmup_steps=1, num_training_steps=steps)
    collate = Collator(plan, 0)
    at, began = 0, now()
    for step in range(steps):
        if step == WARM_UP:
            began = now()
        micro = [
            rows[at + i * plan.micro_batch : at + (i + 1) * plan.micro_batch] for i in range(plan.gradient_accumulation)
        ]
        at += plan.effective_batch
        batches = [collate(some) for some in micro]
        count = sum((batch["labels"][..., 1:] != -100).sum() for batch in batches)
        total = torch.zeros(())
        for batch in batches:
            loss = model(**batch, num_items_in_batch=count)["loss"]
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        total.item()
    return since(began, now())


def main() -> None:
    """Print the ratio of each pair and their median."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--method", choices=[*METHODS, "all"], default="all")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--accumulation", type=int, default=1)
    given = parser.parse_args()
    if given.steps <= WARM_UP:
        parser.error(f"--steps must be more than the {WARM_UP} that warm up")
    transformers_logging.disable_default_handler()
    for method in METHODS if given.method == "all" else [given.method]:
        plan = plan_from_fields(
            {
                "model": "small",
                "micro_batch": 2,
                "seq_len": 256,
                "dtype": "float32",
                "gradient_accumulation": given.accumulation,
                **METHODS[method],
                "training": {"max_steps": given.steps, "learning_rate": 1e-4},
            }
        )
        rows = make_rows(plan, given.steps)
        ratios: list[Times] = []
        loops: list[float] = []
        for pair in range(given.pairs):
            # Who goes first changes, too.
            runs = (time_ours, time_loop) if pair % 2 else (time_loop, time_ours)
            took = {run: run(plan, rows, given.steps) for run in runs}
            (our_wall, our_work), (wall, work) = took[time_ours], took[time_loop]
            ratios.append((our_wall / wall, our_work / work))
            loops.append(work / (given.steps - WARM_UP))
        on_the_wall, in_work = (statistics.median(column) for column in zip(*ratios, strict=True))
        print(
            f"{method}: {in_work:.4f} of a bare loop's processor time, {on_the_wall:.4f} of its time on the wall "
            f"({1000 * statistics.median(loops):.0f} ms a step; processor time of each pair "
            f"{', '.join(f'{ratio:.3f}' for _, ratio in ratios)})",
            flush=True,
        )


if __name__ == "__main__":
    main()
