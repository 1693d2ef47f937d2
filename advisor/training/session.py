"""One training, from data to artefacts."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from advisor.errors import InputError
from advisor.plan import Plan, plan_to_fields
from advisor.report.terminal.console import make_console
from advisor.report.terminal.training import TrainingDisplay
from advisor.training.artefacts import CardFacts, save_artefacts
from advisor.training.build import BuiltModel, build_skeleton, fill_model, load_model
from advisor.training.checkpoints import CHECKPOINTS, Checkpoint, complete_checkpoints, go_back_to_sound
from advisor.training.data import (
    ArrayRows,
    Collator,
    LengthSampler,
    PreparedData,
    prepare_data,
    source_key,
    take_tokens,
)
from advisor.training.data.collate import keeps_masks_below
from advisor.training.interruption import Interrupted, Interruption
from advisor.training.job import Job
from advisor.training.log import quiet_libraries
from advisor.training.metrics import METRICS, Metrics
from advisor.training.monitor import MemoryReader, Monitor, Progressed, Saving
from advisor.training.refusals import (
    refuse_another_run,
    refuse_padding_with_the_end,
    refuse_slow_arithmetic,
    usable_device,
)
from advisor.training.tokenizer import load_tokenizer
from advisor.training.trainer import PlanTrainer, steps_of, training_arguments

if TYPE_CHECKING:
    from transformers import TrainingArguments

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets")


class Session:
    """Runs a job; what it has reached can be asked for at any time.

    Args:
        job: what to train.
        interruption: asked between steps whether to stop.
    """

    def __init__(self, job: Job, interruption: Interruption) -> None:
        self._job = job
        self._plan = job.plan
        self._folder = Path(job.out)
        self._interruption = interruption
        self._progressed = Progressed()
        self._memory: MemoryReader | None = None
        self.finished = False
        """Whether everything is written: nothing that comes afterwards can take it away."""

    def facts(self) -> dict[str, Any]:
        """The fields of a Result that the training knows."""
        done = self._progressed
        allocated, reserved = self._memory.peaks() if self._memory else (None, None)
        return {
            "step": done.step,
            "steps": done.steps,
            "first_loss": done.first_loss,
            "final_loss": done.final_loss,
            "evaluation_loss": done.evaluation_loss,
            "peak_allocated_bytes": allocated,
            "peak_reserved_bytes": reserved,
            "driver_bytes": self._memory.driver_bytes() if self._memory else None,
            "seconds": done.seconds,
            "tokens": done.tokens,
            "tokens_per_second": done.tokens / done.seconds if done.seconds else None,
        }

    def run(self) -> None:
        """Train, and save what was trained, unless the run is interrupted before.

        Raises:
            AdvisorError: the job cannot be done, or the training failed.
            Interrupted: it was to stop where nothing had to be saved.
        """
        from transformers import set_seed

        quiet_libraries()
        resumed = self._checkpoint_to_resume()
        tokenizer = load_tokenizer(self._job.model_path, trust_remote_code=self._job.trust_remote_code)
        refuse_padding_with_the_end(tokenizer)
        data = self._prepare_data(tokenizer)
        facts = {"plan": plan_to_fields(self._plan), "data": fingerprint(data.train)}
        if resumed is not None:
            refuse_another_run(resumed, facts)
        arguments = training_arguments(
            self._plan,
            self._folder,
            device=self._job.device,
            evaluates=data.validation is not None,
            report_to=self._job.report_to,
        )
        device = usable_device(arguments, self._job.device, self._plan)
        self._memory = MemoryReader(device)
        set_seed(self._plan.training.seed)
        built = self._build(device)
        refuse_slow_arithmetic(self._plan, built)
        # What loading left behind would otherwise stay reserved for the whole run.
        gc.collect()
        empty_cache(device)
        steps = steps_of(self._plan, len(data.train))
        display = TrainingDisplay(
            make_console(),
            steps=steps,
            predicted_bytes=self._job.predicted_reserved_bytes,
            capacity_bytes=self._job.capacity_bytes,
        )
        with Metrics(self._folder / METRICS, after=resumed.step if resumed else 0) as metrics, display:
            saving = Saving(self._job.save_steps)
            monitor = Monitor(
                device=device,
                metrics=metrics,
                interruption=self._interruption,
                saving=saving,
                show=display.update,
                advice=advice_on_divergence(self._plan),
                say=display.say,
            )
            self._progressed = monitor.progressed
            self._progressed.steps = steps
            trainer = self._trainer(built, arguments, data, monitor=monitor, saving=saving, device=device, facts=facts)
            self._train(trainer, resumed)
        if self._interruption.number is None:
            card = self._card(device)
            save_artefacts(built.model, tokenizer, str(self._folder), plan=self._plan, card=card)
            self.finished = True

    def _trainer(
        self,
        built: BuiltModel,
        arguments: TrainingArguments,
        data: PreparedData,
        *,
        monitor: Monitor,
        saving: Saving,
        device: torch.device,
        facts: dict[str, Any],
    ) -> PlanTrainer:
        return PlanTrainer(
            plan=self._plan,
            built=built,
            args=arguments,
            train=ArrayRows(data.train),
            validation=ArrayRows(data.validation) if data.validation is not None else None,
            order=LengthSampler(
                data.train["length"],
                batch_size=self._plan.micro_batch,
                accumulation=self._plan.gradient_accumulation,
                seed=self._plan.training.seed,
            ),
            collator=Collator(
                self._plan,
                data.pad_token_id,
                keeps_masks_below=keeps_masks_below(self._plan, built.causal_lm.config, device),
            ),
            pad_token_id=data.pad_token_id,
            monitor=monitor,
            saving=saving,
            keep_checkpoints=self._job.keep_checkpoints,
            facts=facts,
        )

    def _checkpoint_to_resume(self) -> Checkpoint | None:
        """The last sound one, where the job asks to go on.

        Raises:
            InputError: the folder has checkpoints, and the job does not ask to go on from them.
        """
        folder = self._folder / CHECKPOINTS
        if self._job.resume:
            return go_back_to_sound(folder)
        if complete_checkpoints(folder):
            raise InputError(
                f"{self._folder} has checkpoints of an earlier run.",
                hint="Go on with it: --resume. Or name another folder: --out.",
            )
        return None

    def _prepare_data(self, tokenizer: Any) -> PreparedData:
        """The job's data, tokenised unless the process that started this one has done it."""
        job, training, context = self._job, self._plan.training, context_of(self._job)
        key = source_key(job.data, tokenizer, context=context, skip_bad_rows=job.skip_bad_rows)
        return prepare_data(
            job.data,
            tokenizer,
            seq_len=self._plan.seq_len,
            validation=training.validation,
            seed=training.seed,
            skip_bad_rows=job.skip_bad_rows,
            packing=self._plan.packing,
            context=context,
            tokens=take_tokens(job.out, key),
        )

    def _build(self, device: torch.device) -> BuiltModel:
        job = self._job
        if job.random_weights:
            built = fill_model(build_skeleton(self._plan, read_config(job.model_path)), self._plan, device)
            say_how_it_is_quantised(built, self._plan)
        else:
            built = load_model(self._plan, job.model_path, device, trust_remote_code=job.trust_remote_code)
        if self._plan.training.compile:
            compile_layers(built)
        return built

    def _train(self, trainer: PlanTrainer, resumed: Checkpoint | None) -> None:
        self._interruption.can_wait = True
        try:
            if resumed is not None and resumed.step >= self._progressed.steps:
                # Trainer would take one step more.
                trainer.restore(resumed.path)
                self._progressed.step = resumed.step
            else:
                trainer.train(resume_from_checkpoint=str(resumed.path) if resumed else None)
            done, asked = self._progressed, self._interruption.number is not None
            if trainer.eval_dataset is not None and done.evaluated_at != done.step and not asked:
                trainer.evaluate()
        except Interrupted:
            # In an evaluation, so between two steps.
            trainer.save_now()

    def _card(self, device: torch.device) -> CardFacts:
        done = self._progressed
        allocated, reserved = self._memory.peaks() if self._memory else (None, None)
        return CardFacts(
            base_model=self._job.model_path,
            data=self._job.data,
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper(),
            steps=done.step,
            first_loss=done.first_loss,
            final_loss=done.final_loss,
            evaluation_loss=done.evaluation_loss,
            predicted_allocated_bytes=self._job.predicted_allocated_bytes,
            predicted_reserved_bytes=self._job.predicted_reserved_bytes,
            peak_allocated_bytes=allocated,
            peak_reserved_bytes=reserved,
            seconds=done.seconds,
            tokens=done.tokens,
            versions={name: version for name in _PACKAGES if (version := _version(name))},
        )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def context_of(job: Job) -> int:
    """Tokens that the model can see at once; the plan's length where it does not say."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(job.model_path, trust_remote_code=job.trust_remote_code)
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(context) if context else job.plan.seq_len


def read_config(path: str) -> Mapping[str, Any]:
    """The keys of a model's config.json."""
    from transformers.utils.hub import cached_file

    found = cached_file(path, "config.json")
    values: dict[str, Any] = json.loads(Path(str(found)).read_text(encoding="utf-8"))
    return values


def say_how_it_is_quantised(built: BuiltModel, plan: Plan) -> None:
    """Trainer asks a quantised model's quantiser whether it can be trained; a model that was not loaded has none."""
    if plan.quantization is not None:
        from transformers import BitsAndBytesConfig
        from transformers.quantizers.auto import AutoHfQuantizer

        built.causal_lm.hf_quantizer = AutoHfQuantizer.from_config(BitsAndBytesConfig(load_in_4bit=True))


def fingerprint(rows: Any) -> str:
    """Of the tokens of a data set, in their order."""
    digest = hashlib.sha256()
    for name in ("input_ids", "length"):
        for chunk in rows.data.column(name).chunks:
            values = chunk.flatten() if hasattr(chunk, "flatten") and name == "input_ids" else chunk
            digest.update(values.to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()


def empty_cache(device: torch.device) -> None:
    """Give segments that hold nothing back to the device."""
    release = getattr(getattr(torch, device.type, None), "empty_cache", None)
    if release is not None:
        release()


def compile_layers(built: BuiltModel) -> None:
    """torch.compile each decoder layer in place: one graph serves them all, and checkpointing stays around it."""
    layers = getattr(built.decoder, "layers", None)
    for module in layers if layers is not None else [built.decoder]:
        module.compile()


def advice_on_divergence(plan: Plan) -> str:
    """What to change when the loss is no number."""
    lower = "Train with a learning rate ten times lower"
    if "float16" in (plan.dtype, plan.autocast):
        return (
            f"{lower}, or use bfloat16 where the GPU has it: float16 ends at 65,504. A T4 has none; there "
            'dtype = "float32" with autocast = "float16" holds more.'
        )
    return f"{lower}, or with more warm-up, and look for rows that are not text."
