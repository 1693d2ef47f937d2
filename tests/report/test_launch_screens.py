"""The screens of a run: what is to be trained, how it ended, and what to do where it did not work."""

from __future__ import annotations

import errno
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from advisor.advise import Request, advise
from advisor.cli import launch as conducting
from advisor.cli.common import ProgressLine
from advisor.cli.launch import failure
from advisor.hardware import what_if
from advisor.launch.attempt import Attempt, next_plan, resume_command, step_down_until_it_fits
from advisor.launch.data import DataFacts, Packing
from advisor.launch.device_check import DeviceCheck
from advisor.launch.model import ModelFiles
from advisor.launch.preflight import Preflight
from advisor.launch.probing import Probed
from advisor.launch.process import Ended
from advisor.launch.resolve import Launch
from advisor.launch.stepdown import StepDown
from advisor.launch.storage import disk_need
from advisor.profiles import default_plan, find_model, load_gpu, load_model
from advisor.report.terminal.launch import (
    render_dry_run,
    render_interrupted,
    render_launch,
    render_out_of_memory,
    render_probed,
    render_report,
    render_set_aside,
)
from advisor.training.data import MarkedExample
from advisor.training.job import Job
from advisor.training.result import Result
from advisor.units import GIB

T4 = what_if(load_gpu("t4"))
MINI = load_model("phi-3-mini-4k")


@pytest.fixture(scope="module")
def launch() -> Launch:
    """Phi-3-mini on a T4, as advised, with a download ahead."""
    advice = advise(MINI, T4, Request(seq_len=512))
    choice = advice.choice
    job = Job(
        plan=choice.plan,
        model_path="microsoft/Phi-3-mini-4k-instruct",
        data="/data/train.jsonl",
        out="/runs/one",
        predicted_allocated_bytes=choice.memory.allocated_bytes,
        predicted_reserved_bytes=choice.memory.reserved_bytes,
        capacity_bytes=14 * GIB,
    )
    files = ModelFiles(
        path="m", weight_bytes=8 * GIB, largest_file_bytes=5 * GIB, download_bytes=7 * GIB, cache="/cache"
    )
    need = disk_need(choice.plan, MINI.architecture, keep=2)
    found = Preflight(problems=(), disk=need, model=files, rows=100, check=DeviceCheck())
    facts = DataFacts(
        source="/data/train.jsonl",
        format="messages",
        train_samples=95,
        validation_samples=5,
        tokens=20_000,
        percentiles=((50, 180), (95, 400), (100, 900)),
        lengths=(180,) * 100,
        seq_len=512,
        truncated=3,
        left_out=2,
        first=MarkedExample(pieces=(("<|user|> Hi\x1b[2J<|end|>", False), ("Hello<|end|>", True)), tokens=9, learned=3),
        notes=("Left out, by their names: test.jsonl.",),
    )
    packing = Packing(
        packs=True, reason="Packing saves 40% of the tokens computed.", samples_a_row=2.0, effective_batch=8
    )
    return Launch(
        job=job,
        gpu=T4,
        model=find_model("phi-3-mini-4k"),
        architecture=MINI.architecture,
        preflight=found,
        advice=advice,
        memory=choice.memory,
        fit=choice.fit,
        data=facts,
        packing=packing,
    )


def screen(render: Any, *values: Any, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None, highlight=False, markup=False, emoji=False)
    render(*values, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def words(text: str) -> str:
    return " ".join(text.split())


def attempt(launch: Launch, outcome: Any, **fields: Any) -> Attempt:
    result = Result(outcome=outcome, **{"step": 40, "steps": 100, **fields})
    return Attempt(launch=launch, ended=Ended(result=result, signal=None, exit_code=1, killed=False))


@pytest.mark.parametrize("width", [60, 80, 120])
def test_what_will_be_trained_is_shown_within_the_width(launch: Launch, width: int) -> None:
    text = screen(render_launch, launch, width=width)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    said = words(text)
    for part in (
        "3 longer ones are cut",
        "2 samples",
        "»Hello<|end|>«",
        "7.00 GiB into /cache",
        "8 rows to an optimizer step",
        "learning rate 0.0002",
        "test.jsonl",
        "Fits.",
    ):
        assert part in said, part
    assert "\x1b" not in text


def test_a_dry_run_shows_the_command_whole_and_alone(launch: Launch) -> None:
    lines = screen(render_dry_run, launch, None).splitlines()
    assert any(line.endswith("-m advisor.training.run /runs/one/job.json") for line in lines)
    assert "Probe: not probed" in words("\n".join(lines))


def test_the_probe_s_verdict_and_what_was_given_up_for_it(launch: Launch) -> None:
    step = next_plan(launch)
    assert step is not None
    probed = Probed(
        launch=launch,
        holds=True,
        reserved_bytes=11 * GIB,
        allocated_bytes=10 * GIB,
        step_seconds=2.0,
        tokens_per_second=900.0,
        steps_down=(step,),
    )
    said = words(screen(render_probed, probed))
    assert "Probe: it holds: peak reserved 11.00 GiB." in said
    assert step.change in said


def test_the_report_has_predicted_probed_and_actual(launch: Launch) -> None:
    done = attempt(
        launch,
        "finished",
        step=100,
        first_loss=2.5,
        final_loss=1.25,
        evaluation_loss=1.5,
        peak_allocated_bytes=9 * GIB,
        peak_reserved_bytes=10 * GIB,
        driver_bytes=11 * GIB,
        seconds=3000.0,
        tokens_per_second=1000.0,
    )
    said = words(screen(render_report, [done], None))
    for part in (
        "Trained: 100 steps",
        "probed not probed",
        "actual 10.00 GiB",
        "driver's view 11.00 GiB",
        "50 min, 1,000 tokens/s",
        "2.5000 at first, 1.2500 at the end, 1.5000 on what was held out",
        'AutoPeftModelForCausalLM.from_pretrained("/runs/one")',
        "phi3-advise merge /runs/one",
    ):
        assert part in said, part


def test_an_interrupted_run_says_where_its_checkpoint_is_and_how_to_go_on(launch: Launch) -> None:
    stopped = attempt(launch, "interrupted", checkpoint="/runs/one/checkpoints/checkpoint-40")
    text = screen(render_interrupted, stopped)
    assert "/runs/one/checkpoints/checkpoint-40" in text
    assert f"  {resume_command(launch)}" in text.splitlines()
    early = attempt(launch, "interrupted", step=0, steps=0, message="It was stopped before the first step.")
    assert "There is no checkpoint" in screen(render_interrupted, early)


def test_out_of_memory_says_predicted_reached_and_the_next_plan(launch: Launch) -> None:
    failed = attempt(launch, "out_of_memory", step=0, peak_reserved_bytes=13 * GIB, message="Memory ran out.")
    said = words(screen(render_out_of_memory, failed, next_plan(launch), False))
    assert "Out of memory at step 1." in said
    assert "13.00 GiB, and more was asked for" in said
    assert "Next plan to try: micro-batch" in said
    assert "the effective batch stays" in said
    assert "Nothing is left to give up" in screen(render_out_of_memory, failed, None, False)


def test_steps_that_save_next_to_nothing_are_taken_together(launch: Launch) -> None:
    plan = replace(
        launch.job.plan, micro_batch=1, gradient_accumulation=16, gradient_checkpointing=True, loss="chunked"
    )
    smallest = launch.with_plan(plan)
    step = next_plan(smallest)
    assert smallest.memory is not None
    # A LoRA plan's optimizer states are small: 8 bits of them alone would not be worth another loading of the model.
    assert step is not None
    after = smallest.with_plan(step.plan).memory
    assert after is not None
    assert after.reserved_bytes <= 0.97 * smallest.memory.reserved_bytes


def test_a_plan_that_does_not_fit_steps_down_until_it_does(launch: Launch) -> None:
    large = replace(
        launch.job.plan, micro_batch=16, gradient_accumulation=1, seq_len=4096, gradient_checkpointing=False
    )
    unfit = launch.with_plan(large)
    assert not unfit.fits
    smaller, steps = step_down_until_it_fits(unfit)
    assert smaller.fits
    assert steps
    assert smaller.job.plan.effective_batch == 16
    assert smaller.job.predicted_reserved_bytes == smaller.memory.reserved_bytes if smaller.memory else False
    assert step_down_until_it_fits(launch) == (launch, ())


@pytest.mark.parametrize(
    ("outcome", "said", "resumes"),
    [
        ("diverged", "the loss is no number", False),
        ("disk_full", "is full, at step 40", True),
        ("failed", "failed at step 40", True),
    ],
)
def test_a_failure_says_what_why_and_what_to_do(launch: Launch, outcome: str, said: str, resumes: bool) -> None:
    kept = "/runs/one/checkpoints/checkpoint-30"
    error = failure(attempt(launch, outcome, message="Because.", hint="Mend it.", checkpoint=kept))
    assert error.exit_code == 4
    assert said in error.what
    assert error.why == f"Because. The last checkpoint, {kept}, is complete."
    assert error.hint.startswith("Mend it.")
    assert ("--resume" in error.hint) == resumes


class ClosedTerminal(io.StringIO):
    def write(self, _: str) -> int:
        raise OSError(errno.EIO, "Input/output error")


def test_a_terminal_that_was_closed_takes_no_word_and_the_exit_code_is_its_signal_s(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    silenced: list[bool] = []
    monkeypatch.setattr(conducting, "silence_stdout", lambda: silenced.append(True))
    stopped = attempt(launch, "interrupted", signal=1)
    assert conducting._report([stopped], None, Console(file=ClosedTerminal())) == 129
    assert silenced == [True]


def test_a_compiled_plan_says_that_its_memory_is_not_in_the_numbers(launch: Launch) -> None:
    plan = launch.job.plan
    compiled = launch.with_plan(replace(plan, training=replace(plan.training, compile=True)))
    said = "torch.compile, whose memory is in no estimate and no trace: only a probe sees it"
    assert said in words(screen(render_launch, compiled))
    assert "torch.compile" not in words(screen(render_launch, launch))


def test_what_is_to_be_heard_of_a_run_that_goes_on_is_shown(launch: Launch) -> None:
    goes_on = replace(launch, notes=("The run goes on from its checkpoint of step 30.",))
    assert "! The run goes on from its checkpoint of step 30." in words(screen(render_launch, goes_on))


def test_what_was_given_and_cannot_be_used_is_no_reason_to_go_on(launch: Launch) -> None:
    error = failure(attempt(launch, "failed", message="Other data.", hint="Mend it.", checkpoint="/c", exit_code=2))
    assert (error.exit_code, error.hint) == (2, "Mend it.")


@pytest.mark.parametrize(
    ("answers", "seq_len", "method", "taken"),
    [([True], 1024, "lora", True), ([False, True], 2048, "qlora", True), ([False, False], 2048, "qlora", False)],
)
def test_sequences_are_cut_only_where_somebody_agrees(
    launch: Launch, monkeypatch: pytest.MonkeyPatch, answers: list[bool], seq_len: int, method: str, taken: bool
) -> None:
    given = iter(answers)
    monkeypatch.setattr(conducting, "_somebody_answers", lambda _: True)
    monkeypatch.setattr("click.confirm", lambda *_, **__: next(given))
    plan = default_plan("lora", model="phi-3-mini-4k", dtype="float16")
    plan = replace(plan, seq_len=2048, loss="chunked", optimizer="paged_adamw_8bit", micro_batch=1)
    launch = replace(launch, advice=None)
    step, is_taken = conducting._next_plan(launch.with_plan(plan), conducting.Conduct())
    assert step is not None
    assert (step.plan.seq_len, step.plan.method, is_taken) == (seq_len, method, taken)


@pytest.mark.parametrize(("how", "asks"), [({}, True), ({"yes": True}, False)])
def test_a_probe_that_runs_out_of_memory_asks_without_the_line_that_says_what_is_done(
    launch: Launch, monkeypatch: pytest.MonkeyPatch, how: dict[str, bool], asks: bool
) -> None:
    seen: list[object] = []

    def probe(_: Launch, __: object, *, steps_down: bool, consents: Callable[[StepDown], bool] | None) -> None:
        step = next_plan(launch)
        assert step is not None
        seen.append(steps_down)
        seen.append(consents(step) if consents is not None else None)

    class Status:
        def stop(self) -> None:
            seen.append("stopped")

        def start(self) -> None:
            seen.append("started")

    @contextmanager
    def line(*_: object) -> Iterator[ProgressLine]:
        yield ProgressLine(lambda _: None, Status())  # type: ignore[arg-type]

    monkeypatch.setattr(conducting, "_somebody_answers", lambda _: True)
    monkeypatch.setattr(conducting, "progress_line", line)
    monkeypatch.setattr("advisor.launch.probing.probe_launch", probe)
    monkeypatch.setattr("click.confirm", lambda text, **_: seen.append(text) or True)
    conducting._probe(launch, conducting.Conduct(fallback=True, **how))
    if not asks:
        assert seen == [True, None]
        return
    assert [seen[0], seen[1], *seen[3:]] == [True, "stopped", "started", True]
    assert str(seen[2]).endswith("Longer samples lose their ends.")


def test_nobody_is_asked_in_a_pipe_and_only_fallback_goes_on(launch: Launch) -> None:
    step, taken = conducting._next_plan(launch, conducting.Conduct(yes=True))
    assert step is not None
    assert not taken
    assert conducting._next_plan(launch, conducting.Conduct(fallback=True))[1]


def test_work_that_is_there_is_not_thrown_away_with_a_nod(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(conducting, "_somebody_answers", lambda _: True)
    monkeypatch.setattr("click.confirm", lambda text, default, **_: asked.append((text, default)) or default)
    launch = replace(launch, advice=None)
    plain = conducting._next_plan(launch, conducting.Conduct())
    assert plain[1]
    kept = conducting._next_plan(launch, conducting.Conduct(), kept=True)
    assert kept == (plain[0], False)
    assert asked[0][0].startswith("Out of memory. Start again with")
    assert asked[1][0].endswith("What was trained so far is set aside.")


def test_a_checkpoint_before_memory_ran_out_is_said(launch: Launch) -> None:
    step = next_plan(launch)
    done = attempt(launch, "out_of_memory", step=40, checkpoint="/runs/one/checkpoints/checkpoint-30")
    said = words(screen(render_out_of_memory, done, step, False))
    assert "The last checkpoint, /runs/one/checkpoints/checkpoint-30, is complete." in said
    assert "phi3-advise train --resume --out /runs/one" in said
    assert "--resume" not in words(screen(render_out_of_memory, attempt(launch, "out_of_memory"), step, False))
    aside = words(screen(render_set_aside, replace(done, aside="/runs/one/attempt-1")))
    assert "from the beginning; what the attempt before left is in /runs/one/attempt-1." in aside
