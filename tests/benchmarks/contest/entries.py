"""The trainers that are compared: ours, a plain transformers.Trainer script, and TRL's SFTTrainer.

Each trains two epochs of the same rows of token ids with the same adapters, micro-batch and accumulation, the first to
warm up. Each is written as its own documentation writes it: `defaults` changes nothing that need not be changed, `best`
takes what its library has for speed without another package.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Method = Literal["lora", "qlora"]
Settings = Literal["defaults", "best"]

PADDING = 0
"""<unk>: no row has it, so what is filled up can be told from what is trained."""

RANK = 16
EPOCHS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Contest:
    """What every entry is given."""

    model: str
    """A folder with weights and a tokenizer."""

    method: Method
    rows: Sequence[Sequence[int]]
    seq_len: int
    micro_batch: int
    accumulation: int
    device: str
    folder: str
    """Where a trainer may write."""

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """What 16 bits are there: a GPU below capability 8.0 only emulates bfloat16."""


@dataclass(slots=True)
class Clock:
    """Real tokens and seconds of the second half of all steps, the second epoch: every row once, for every trainer."""

    device: str
    computed: int = 0
    """Padding included."""

    steps: int = 0
    _began: float = 0.0
    _counts: bool = field(default=False)
    _sums: list[Any] = field(default_factory=list)

    def count(self, ids: Any) -> None:
        """One micro-batch; some trainers' are on the GPU by then, and nobody waits for it here."""
        if self._counts:
            self._sums.append((ids != PADDING).sum())
            self.computed += ids.numel()

    @property
    def tokens(self) -> int:
        """Without padding."""
        return sum(int(one) for one in self._sums)

    def step_ended(self, step: int, steps: int) -> None:
        """After optimizer step number so many of all."""
        self._wait()
        if step == steps // 2:
            self._began, self._counts = time.perf_counter(), True
        elif self._counts:
            self.steps += 1
            self._ended = time.perf_counter()

    _ended: float = 0.0

    @property
    def seconds(self) -> float:
        """From the end of the first epoch to the end of the second."""
        return self._ended - self._began

    def _wait(self) -> None:
        if self.device.startswith("cuda"):
            import torch

            torch.cuda.synchronize()


def timed(trainer_class: type, clock: Clock) -> type:
    """The same Trainer, telling a clock of its micro-batches and steps."""
    from transformers import TrainerCallback

    class Steps(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
            clock.step_ended(state.global_step, state.max_steps)

    class Timed(trainer_class):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.add_callback(Steps())

        def training_step(self, model: Any, inputs: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
            clock.count(inputs["input_ids"])
            return super().training_step(model, inputs, *args, **kwargs)

    return Timed


def train_ours(contest: Contest, settings: Settings, clock: Clock) -> None:
    """phi3-advise's own Trainer; `best` packs, as it does by itself where padding would cost a tenth."""
    from advisor.profiles import plan_with_defaults
    from advisor.training.build import load_model
    from advisor.training.data import Collator, LengthSampler
    from advisor.training.interruption import Interruption
    from advisor.training.log import quiet_libraries
    from advisor.training.metrics import METRICS, Metrics
    from advisor.training.monitor import Monitor, Saving
    from advisor.training.trainer import PlanTrainer, training_arguments

    quiet_libraries()
    best = settings == "best"
    fields: dict[str, Any] = {"model": contest.model, "method": contest.method, "seq_len": contest.seq_len}
    fields |= {"micro_batch": contest.micro_batch, "gradient_accumulation": contest.accumulation}
    fields |= {"packing": best, "gradient_checkpointing": not best, "lora": {"rank": RANK}}
    fields |= {"training": {"epochs": float(EPOCHS)}}
    plan = plan_with_defaults(fields, dtype=contest.dtype)
    rows = packed_rows(contest.rows, contest.seq_len) if best else [_row(ids) for ids in contest.rows]
    lengths = [len(row["input_ids"]) for row in rows]
    folder = Path(contest.folder)
    with Metrics(folder / METRICS) as metrics:
        monitor = Monitor(
            device=_device(contest.device),
            metrics=metrics,
            interruption=Interruption(lambda _: None),
            saving=Saving(None),
            show=lambda _: None,
            advice="",
        )
        timed(PlanTrainer, clock)(
            plan=plan,
            built=load_model(plan, contest.model, contest.device),
            args=training_arguments(plan, folder, device=contest.device, evaluates=False),
            train=rows,
            validation=None,
            order=LengthSampler(
                lengths, batch_size=plan.micro_batch, accumulation=plan.gradient_accumulation, seed=plan.training.seed
            ),
            collator=Collator(plan, PADDING),
            pad_token_id=PADDING,
            monitor=monitor,
            saving=Saving(None),
        ).train()


def packed_rows(rows: Sequence[Sequence[int]], seq_len: int) -> list[dict[str, Any]]:
    """Samples end to end, as our data preparation packs them: the first token of each carries no loss."""
    from advisor.training.data.packing import pack

    packed = []
    for indices in pack([len(ids) for ids in rows], seq_len):
        row: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": []}
        for index in indices:
            row["input_ids"] += rows[index]
            row["labels"] += [-100, *rows[index][1:]]
            row["position_ids"] += range(len(rows[index]))
        packed.append(row)
    return packed


def train_plain(contest: Contest, settings: Settings, clock: Clock) -> None:
    """A script over transformers.Trainer and PEFT; `best` groups rows by length and computes in 16 bits throughout."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

    best = settings == "best"
    model = AutoModelForCausalLM.from_pretrained(contest.model, **_loading(contest))
    if contest.method == "qlora":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=not best)
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear"))
    tokenizer = AutoTokenizer.from_pretrained(contest.model)
    grouped = _grouping() if best else {}
    trainer = timed(Trainer, clock)(
        model=model,
        args=TrainingArguments(**_arguments(contest), **_precision(contest), **grouped),
        train_dataset=[{"input_ids": ids, "labels": ids} for ids in contest.rows],
        data_collator=_padding_collator(tokenizer),
    )
    trainer.train()


def train_trl(contest: Contest, settings: Settings, clock: Clock) -> None:
    """TRL's SFTTrainer; `best` packs and does without checkpointing."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    best = settings == "best"
    tokenizer = AutoTokenizer.from_pretrained(contest.model)
    tokenizer.pad_token = "<unk>"
    model = AutoModelForCausalLM.from_pretrained(contest.model, **_loading(contest))
    more = {"packing": True, "gradient_checkpointing": False} if best else {}
    trainer = timed(SFTTrainer, clock)(
        model=model,
        args=SFTConfig(**_arguments(contest), **_precision(contest), max_length=contest.seq_len, **more),
        train_dataset=Dataset.from_dict({"input_ids": [list(ids) for ids in contest.rows]}),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()


def _row(ids: Sequence[int]) -> dict[str, Any]:
    return {"input_ids": list(ids), "labels": list(ids)}


def _device(name: str) -> Any:
    import torch

    return torch.device(name)


def _loading(contest: Contest) -> dict[str, Any]:
    """How scripts load: what all compute in, or 4 bits that compute in it."""
    import torch

    dtype = getattr(torch, contest.dtype)
    settings: dict[str, Any] = {"dtype": dtype, "device_map": {"": contest.device}}
    if contest.method == "qlora":
        from transformers import BitsAndBytesConfig

        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return settings


def _arguments(contest: Contest) -> dict[str, Any]:
    """What no trainer can choose for itself here."""
    return {
        "output_dir": contest.folder,
        "per_device_train_batch_size": contest.micro_batch,
        "gradient_accumulation_steps": contest.accumulation,
        "num_train_epochs": EPOCHS,
        "learning_rate": 2e-4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": contest.device == "cpu",
    }


def _precision(contest: Contest) -> dict[str, bool]:
    """Autocast to the same 16 bits; TRL's default is bf16."""
    return {"bf16": contest.dtype == "bfloat16", "fp16": contest.dtype == "float16"}


def _grouping() -> dict[str, Any]:
    """Rows of like lengths in a batch; transformers has renamed the argument."""
    from dataclasses import fields

    from transformers import TrainingArguments

    if "train_sampling_strategy" in {one.name for one in fields(TrainingArguments)}:
        return {"train_sampling_strategy": "group_by_length"}
    return {"group_by_length": True}


def _padding_collator(tokenizer: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """Pads to the longest row of the batch, with a mask."""
    from transformers import DataCollatorForSeq2Seq

    tokenizer.pad_token = "<unk>"
    return DataCollatorForSeq2Seq(tokenizer, padding=True)


ENTRIES: Mapping[str, Callable[[Contest, Settings, Clock], None]] = {
    "ours": train_ours,
    "transformers.Trainer": train_plain,
    "trl.SFTTrainer": train_trl,
}

NEEDS: Mapping[str, tuple[str, ...]] = {"trl.SFTTrainer": ("trl", "datasets")}
"""Packages without which an entry is left out."""

__all__ = ["ENTRIES", "NEEDS", "PADDING", "Clock", "Contest", "packed_rows", "timed"]
