"""The `transformers.Trainer` of all three methods: our optimizer and batches, checkpoints complete or absent."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader
from transformers import PrinterCallback, Trainer, TrainerState, TrainingArguments, get_scheduler

from advisor.errors import InputError
from advisor.plan import Plan
from advisor.training.build import BuiltModel, build_optimizer
from advisor.training.checkpoints import CHECKPOINTS, rotate, write_checkpoint
from advisor.training.monitor import Monitor, Saving
from advisor.training.optimizer import learning_rate_of
from advisor.training.step import MAX_GRADIENT_NORM
from advisor.training.tensor_files import SHARD_BYTES

IGNORED_LABEL = -100


def training_arguments(
    plan: Plan, folder: Path, *, device: str, evaluates: bool, report_to: Sequence[str] = ()
) -> TrainingArguments:
    """`Plan` in transformers' words; what this package does itself is switched off there."""
    training = plan.training
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=plan.micro_batch,
        per_device_eval_batch_size=plan.micro_batch,
        gradient_accumulation_steps=plan.gradient_accumulation,
        num_train_epochs=training.epochs,
        max_steps=training.max_steps or -1,
        learning_rate=learning_rate_of(plan),
        lr_scheduler_type=training.schedule,
        weight_decay=training.weight_decay,
        optim=plan.optimizer,
        bf16=plan.autocast == "bfloat16",
        fp16=plan.autocast == "float16",
        # Norms are of all gradients, and with the optimizer in backward they never stand together.
        max_grad_norm=0.0 if plan.optimizer_in_backward else MAX_GRADIENT_NORM,
        seed=training.seed,
        use_cpu=device == "cpu",
        eval_strategy="epoch" if evaluates else "no",
        prediction_loss_only=True,
        save_strategy="no",
        logging_steps=1,
        # It would put the mean of earlier losses in the place of one that is not a number.
        logging_nan_inf_filter=False,
        report_to=list(report_to) or "none",
        disable_tqdm=True,
        log_level="info",
        remove_unused_columns=False,
        label_names=["labels"],
        average_tokens_across_devices=False,
    )


def steps_of(plan: Plan, rows: int) -> int:
    """Optimizer steps of a run over so many rows, as Trainer.set_initial_training_values counts them."""
    if plan.training.max_steps is not None:
        return plan.training.max_steps
    micro_steps = math.ceil(rows / plan.micro_batch)
    return math.ceil(plan.training.epochs * math.ceil(micro_steps / plan.gradient_accumulation))


def follow_schedule(scheduler: Any) -> None:
    """Give the next step the rate that a schedule of torch.optim's LambdaLR has for it."""
    rates = [
        base * rate(scheduler.last_epoch) for base, rate in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


class EpochBatches(BatchSampler):
    """Batches of a sampler that has another order in each epoch.

    The epoch is asked for when it begins: a loader that skips what a resumed run has trained on keeps its batch
    sampler, but accelerate up to 1.14 forgets the epoch there, and would go through the first one's order again.

    Args:
        order: a sampler with `set_epoch`.
        size: rows in a batch; the last may have fewer.
        epoch: tells which epoch it is.
    """

    def __init__(self, order: Any, size: int, epoch: Callable[[], int]) -> None:
        super().__init__(order, size, drop_last=False)
        self._order = order
        self._epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        self._order.set_epoch(self._epoch())
        yield from super().__iter__()


class PlanTrainer(Trainer):
    """Trains a built model as its plan says.

    Args:
        plan: what is trained.
        built: the model, as `load_model` or `build_model` made it.
        args: from `training_arguments`.
        train: rows that `collator` makes batches of.
        validation: the same, or None.
        order: a sampler over the training rows with `set_epoch`.
        collator: rows → tensors of a batch.
        pad_token_id: what rows are filled up with; such tokens are not counted.
        monitor: what watches.
        saving: told how long a checkpoint took.
        keep_checkpoints: how many stay.
        facts: what each checkpoint says about the run.
    """

    def __init__(
        self,
        *,
        plan: Plan,
        built: BuiltModel,
        args: TrainingArguments,
        train: Any,
        validation: Any,
        order: Any,
        collator: Callable[[list[Any]], Any],
        pad_token_id: int,
        monitor: Monitor,
        saving: Saving,
        keep_checkpoints: int = 2,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self._plan = plan
        self._order = order
        self._padding = pad_token_id
        self._monitor = monitor
        self._saving = saving
        self._keep = keep_checkpoints
        self._facts = dict(facts or {})
        self._aside: Path | None = None
        self._rows = train
        self._built = built
        self.checkpoints = Path(str(args.output_dir)) / CHECKPOINTS
        super().__init__(
            model=built.model,
            args=args,
            data_collator=collator,
            train_dataset=train,
            eval_dataset=validation,
            callbacks=[monitor],
        )
        self.remove_callback(PrinterCallback)

    def create_optimizer(self, *_: Any, **__: Any) -> torch.optim.Optimizer:
        """The plan's, which the trace and the probe step with too."""
        if self.optimizer is None:
            self.optimizer = build_optimizer(self._plan, self._built.model)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """The plan's schedule; its warm-up is a share of the steps."""
        if self.lr_scheduler is None:
            self.lr_scheduler = get_scheduler(
                self._plan.training.schedule,
                optimizer=optimizer or self.create_optimizer(),
                num_warmup_steps=math.ceil(self._plan.training.warmup * num_training_steps),
                num_training_steps=num_training_steps,
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """What is loaded is the rate of the length that the run had then; the next step's is that of its length now."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            before = self._get_learning_rate()
            follow_schedule(self.lr_scheduler)
            self._monitor.goes_on(before, self._get_learning_rate())

    def get_train_dataloader(self) -> DataLoader[Any]:
        """In the order of the sampler; a generator of its own leaves torch's random state alone."""
        micro_steps = math.ceil(len(self._rows) / self._plan.micro_batch)
        steps = math.ceil(micro_steps / self._plan.gradient_accumulation)
        batches = EpochBatches(self._order, self._plan.micro_batch, lambda: self.state.global_step // steps)
        return DataLoader(self._rows, batch_sampler=batches, collate_fn=self.data_collator, generator=torch.Generator())

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """In the order of the rows."""
        rows: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        return DataLoader(
            rows,
            batch_size=self._plan.micro_batch,
            collate_fn=self.data_collator,
            generator=torch.Generator(),
        )

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The micro-batches of a step, on the host.

        Raises:
            InputError: no token of them carries loss.
        """
        began = time.perf_counter()
        samples, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if samples and not any(bool((batch["labels"][..., 1:] != IGNORED_LABEL).any()) for batch in samples):
            raise InputError(
                f"No token in the batch of step {self.state.global_step + 1} carries loss.",
                why="Every label is masked, so the step would train on nothing; its loss is 0 or not a number.",
                hint="Look for rows without an answer, or raise seq_len: a long prompt may leave no room for one.",
            )
        self._monitor.begin_step(began, sum(int((batch["input_ids"] != self._padding).sum()) for batch in samples))
        return samples, count

    def floating_point_ops(self, inputs: Any) -> int:  # noqa: ARG002
        """Not counted: it walks every module at every micro-batch."""
        return 0

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        if self._plan.optimizer_in_backward:
            return None
        return super()._get_grad_norm(*args, **kwargs)  # type: ignore[no-untyped-call]

    def restore(self, checkpoint: Path) -> None:
        """The weights of a run that has taken all its steps."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))

    def save_now(self) -> None:
        """Write a checkpoint between two steps."""
        self._save_checkpoint(self.model, None)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._aside is None else str(self._aside)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Trainer writes into a folder aside, which gets its name once everything is on the disk."""

        def write(aside: Path) -> None:
            self._aside = aside
            try:
                with warnings.catch_warnings():
                    # Of torch.save, about a scheduler: it is the optimizer's own that is saved with it.
                    warnings.filterwarnings("ignore", "Please also save or load the state of the optimizer")
                    super(PlanTrainer, self)._save_checkpoint(model, trial)
            finally:
                self._aside = None
            _flatten(aside)

        began = time.perf_counter()
        write_checkpoint(self.checkpoints, self.state.global_step, write, facts=self._facts)
        rotate(self.checkpoints, self._keep)
        self._saving.took(time.perf_counter() - began)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The adapter or the model in safetensors; no pickled arguments."""
        model = self._built.model
        options: dict[str, Any] = {"save_embedding_layers": False}
        if not hasattr(model, "peft_config"):
            # By the names that the model has here: Trainer loads a checkpoint by them, and no others.
            options = {"max_shard_size": SHARD_BYTES, "save_original_format": False}
        model.save_pretrained(output_dir or self.args.output_dir, state_dict=state_dict, **options)


def _flatten(aside: Path) -> None:
    """Trainer wrote checkpoint-N inside the folder that becomes checkpoint-N."""
    (inner,) = aside.iterdir()
    for path in inner.iterdir():
        path.rename(aside / path.name)
    inner.rmdir()
