"""`phi3-advise probe`: one plan, run for a few steps on the device, with random weights."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from advisor.cli.common import print_json, progress_line
from advisor.errors import EnvironmentLacksError, InputError

if TYPE_CHECKING:
    from advisor.hardware import Gpu
    from advisor.plan import Plan
    from advisor.probe.answer import ProbeAnswer
    from advisor.probe.imitate import Imitation
    from advisor.probe.measure import Subject
    from advisor.profiles import ModelSource

LARGEST_STEPS = 25


@dataclass(frozen=True, slots=True, kw_only=True)
class Dryness:
    """How a probe is conducted, whatever plan it is of."""

    steps: int = 3
    data: str | None = None
    find_batch: bool = False
    find_seq_len: bool = False
    skip_bad_rows: bool = False
    trust_remote_code: bool = False
    as_json: bool = False
    debug: bool = False


@click.command("probe")
@click.option("--plan", "path", required=True, type=click.Path(), help="The plan file (TOML).")
@click.option("--device", default=None, help="cuda, cuda:1, cpu, or a number as nvidia-smi counts.")
@click.option("--steps", type=click.IntRange(2, LARGEST_STEPS), default=3, help="Optimizer steps.  [default: 3]")
@click.option("--data", default=None, help="Rows as long as this data's longest, in place of the plan's length.")
@click.option("--as", "as_gpu", default=None, help="Stand in for a smaller GPU (t4), or for this one with 12GiB.")
@click.option("--find-batch", is_flag=True, help="The largest micro-batch that runs, by trying.")
@click.option("--find-seq-len", is_flag=True, help="The longest sequence that runs, by trying.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, and nothing else.")
@click.option("--debug", is_flag=True, help="Show tracebacks, and what the libraries say.")
@click.pass_context
def command(
    ctx: click.Context,
    /,
    path: str,
    device: str | None,
    steps: int,
    data: str | None,
    as_gpu: str | None,
    find_batch: bool,
    find_seq_len: bool,
    as_json: bool,
    debug: bool,
) -> None:
    """Measure one plan on this GPU: the training's own code, a few steps, random weights, nothing downloaded.

    \b
    phi3-advise probe --plan plan.toml
    phi3-advise probe --plan plan.toml --find-batch
    phi3-advise probe --plan plan.toml --as t4
    phi3-advise probe --plan small.toml --device cpu --json

    Exit codes: 0 it ran; 1 out of memory; 3 no GPU here; 4 it failed for another reason.
    """
    from advisor.profiles import find_model, load_gpu, plan_with_defaults, read_toml

    how = Dryness(
        steps=steps, data=data, find_batch=find_batch, find_seq_len=find_seq_len, as_json=as_json, debug=debug
    )
    fields = read_toml(path)
    gpu, imitation = find_device(device, as_gpu)
    target = gpu if imitation is None else imitation.gpu
    plan = plan_with_defaults(fields, folder=os.path.dirname(path), dtype=target.dtype)
    if plan.gpu is not None:
        # One that nobody knows is said before anything is measured.
        load_gpu(plan.gpu)
    ctx.exit(run_probe(plan, find_model(plan.model), gpu, imitation, how))


def find_device(device: str | None, as_gpu: str | None) -> tuple[Gpu, Imitation | None]:
    """The device of this machine that a probe runs on, and the GPU that it stands in for.

    Raises:
        EnvironmentLacksError: there is none.
        InputError: it cannot stand in for that one.
    """
    from advisor.cli.common import detect_gpu
    from advisor.probe.imitate import imitate

    gpu = detect_gpu(device)
    if gpu is None:
        raise EnvironmentLacksError(
            "No GPU was found to probe on.",
            why="A probe measures: it runs the training's own code on the device.",
            hint="Prove the memory without one: phi3-advise trace --plan plan.toml --gpu t4. Or probe a small model on "
            "the processor: --device cpu",
        )
    return gpu, imitate(as_gpu, gpu) if as_gpu is not None else None


def run_probe(plan: Plan, model: ModelSource, gpu: Gpu, imitation: Imitation | None, how: Dryness) -> int:
    """Probes a plan and shows what came of it; returns the exit code.

    Raises:
        AdvisorError: it cannot be probed, or the probe failed.
    """
    from advisor.probe.measure import Subject
    from advisor.traced import require_packages

    if how.find_batch and how.find_seq_len:
        raise InputError(
            "--find-batch and --find-seq-len contradict each other.",
            why="Each grows one setting and leaves the other as it is.",
            hint="Take one after the other.",
        )
    if how.find_seq_len and how.data is not None:
        raise InputError(
            "--find-seq-len and --data contradict each other.",
            why="Rows end where the data's longest does, however long a sequence may be.",
            hint="Leave --data out: then every row is as long as the sequence.",
        )
    require_packages(plan)
    with progress_line(how.debug, "Probing") as progress:
        longest = _longest(plan, model, how, progress) if how.data is not None else None
        subject = Subject(model=model, gpu=gpu, imitation=imitation, steps=how.steps, longest=longest)
        answer = _ask(plan, subject, how, progress)
    if how.as_json:
        from advisor.report.run_json import probe_object

        print_json(probe_object(answer))
    else:
        from advisor.report.terminal import make_console
        from advisor.report.terminal.probe import render_probe

        render_probe(answer, make_console())
    return 0 if answer.fits else 1


def _ask(plan: Plan, subject: Subject, how: Dryness, progress: Callable[[str], None]) -> ProbeAnswer:
    from advisor.probe.answer import ProbeAnswer
    from advisor.probe.find import failure, find_largest
    from advisor.probe.measure import measure
    from advisor.probe.prediction import predict

    found = None
    if how.find_batch or how.find_seq_len:
        found = find_largest("micro_batch" if how.find_batch else "seq_len", plan, subject, progress)
        measurement = found.measurement
        plan = measurement.plan
    else:
        measurement = measure(plan, subject, progress)
    if measurement.outcome not in ("ran", "out_of_memory"):
        raise failure(measurement)
    progress("predicting the same, to compare")
    return ProbeAnswer(
        plan=plan,
        model=subject.model,
        gpu=subject.gpu,
        measurement=measurement,
        imitation=subject.imitation,
        predictions=predict(plan, subject.model, subject.target, longest=subject.longest),
        found=found,
    )


def _longest(plan: Plan, model: ModelSource, how: Dryness, progress: Callable[[str], None]) -> int:
    """Tokens of the data's longest row, as the model's tokenizer has them."""
    from advisor.launch.data import read_data
    from advisor.launch.model import locate_model
    from advisor.shipped_data import shipped_dataset

    assert how.data is not None
    progress("reading the data")
    expanded = os.path.expanduser(how.data)
    source = os.path.abspath(expanded) if os.path.exists(expanded) else shipped_dataset(how.data) or how.data
    context = model.config.get("max_position_embeddings")
    facts = read_data(
        source,
        locate_model(model),
        seq_len=plan.seq_len,
        context=context if isinstance(context, int) else max(plan.seq_len, 2**17),
        validation=plan.training.validation,
        seed=plan.training.seed,
        skip_bad_rows=how.skip_bad_rows,
        trust_remote_code=how.trust_remote_code,
    )
    return min(facts.lengths[-1], plan.seq_len)


__all__ = ["Dryness", "command", "find_device", "run_probe"]
