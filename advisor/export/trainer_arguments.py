"""Fields that transformers' TrainingArguments has, for the tools that are built on its Trainer."""

from __future__ import annotations

from advisor.export.draft import Draft
from advisor.plan import Plan


def set_batches(plan: Plan, draft: Draft) -> None:
    """Micro-batch and accumulation; evaluation in the same micro-batch."""
    draft.set("per_device_train_batch_size", plan.micro_batch, "micro_batch")
    draft.set("gradient_accumulation_steps", plan.gradient_accumulation, "gradient_accumulation")
    draft.set("per_device_eval_batch_size", plan.micro_batch)


def set_schedule(plan: Plan, draft: Draft) -> None:
    """How long, how fast, from which seed."""
    training = plan.training
    draft.set("learning_rate", learning_rate(plan), "training.learning_rate")
    draft.set("lr_scheduler_type", training.schedule, "training.schedule")
    draft.set("warmup_steps", training.warmup, "training.warmup", note="below 1: a share of the steps (transformers 5)")
    draft.set("weight_decay", training.weight_decay, "training.weight_decay")
    draft.set("num_train_epochs", training.epochs, "training.epochs")
    if training.max_steps is None:
        draft.keep("training.max_steps", "the epochs decide")
    else:
        draft.set("max_steps", training.max_steps, "training.max_steps")
    draft.set("seed", training.seed, "training.seed")
    draft.set("torch_compile", training.compile, "training.compile")


def set_optimizer(plan: Plan, draft: Draft) -> None:
    """The optimizer by its name, and what Trainer makes of it."""
    draft.set("optim", plan.optimizer, "optimizer")
    if plan.method == "full" and "8bit" in plan.optimizer:
        draft.lose("optimizer", "Trainer keeps the states of embeddings in 32 bits: 6 bytes a weight more than planned")
    tell_stepping(plan, draft)


def tell_stepping(plan: Plan, draft: Draft) -> None:
    """What none of these tools can be told about a step."""
    if plan.optimizer_in_backward:
        said = "it steps once after backward, so all gradients stand at once: more memory than planned"
        draft.lose("optimizer_in_backward", said, optimizer_in_backward=False)
    else:
        draft.keep("optimizer_in_backward", "it steps after backward")
    if plan.hold_outputs:
        said = "it lets the outputs go before backward: less memory than planned"
        draft.lose("hold_outputs", said, hold_outputs=False)
    else:
        draft.keep("hold_outputs", "it lets the outputs go before backward")


def tell_padding(plan: Plan, draft: Draft) -> None:
    """Batches are padded to their longest row, unless they are packed."""
    if plan.padding == "none" and not plan.packing:
        said = "it pads every batch to its longest row: only rows of one length go without a mask"
        draft.lose("padding", said, padding="longest")
    else:
        draft.keep("padding", "batches are packed" if plan.packing else "batches are padded to their longest row")


def tell_gpu(plan: Plan, draft: Draft) -> None:
    """The GPU is what is there; the plan's only says for which it was made."""
    draft.keep(
        "gpu", f"the plan was made for {plan.gpu}" if plan.gpu else "the plan was made for the GPU that was there"
    )


def learning_rate(plan: Plan) -> float:
    """The plan's, or its method's default."""
    from advisor.training.optimizer import learning_rate_of

    return learning_rate_of(plan)
