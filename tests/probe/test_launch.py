"""A launch probes first, and trains with what held."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from advisor.errors import RunFailedError
from advisor.hardware import Gpu
from advisor.launch.device_check import DeviceCheck
from advisor.launch.preflight import Preflight
from advisor.launch.probing import MOST_PROBES, is_hopeless, probe_launch
from advisor.launch.resolve import Launch
from advisor.launch.stepdown import StepDown
from advisor.memory.estimate import estimate
from advisor.plan import Plan
from advisor.probe.measurement import Measurement
from advisor.profiles import ModelSource, profile_of
from advisor.training.job import Job
from advisor.units import MIB

from .conftest import small_plan


@pytest.fixture
def launch(source: ModelSource, cpu: Gpu, tmp_path: Path) -> Launch:
    plan = small_plan(micro_batch=8, seq_len=1024, gradient_checkpointing=False)
    job = Job(plan=plan, model_path="small", data="data", out=str(tmp_path / "run"), device="cpu")
    found = Preflight(problems=(), disk=None, model=None, rows=1, check=DeviceCheck())
    architecture = profile_of(source).architecture
    memory = estimate(plan, architecture, cpu)
    return Launch(job=job, gpu=cpu, model=source, architecture=architecture, preflight=found, memory=memory)


def answering(*outcomes: str) -> Any:
    """A measure that answers so, one after the other, and the plans that it was asked about."""
    plans: list[Plan] = []

    def measure(plan: Plan, _: Any) -> Measurement:
        outcome: Any = outcomes[min(len(plans), len(outcomes) - 1)]
        plans.append(plan)
        return Measurement(outcome=outcome, plan=plan, reserved_bytes=100 * MIB, failed_at="step 1, loss")

    return measure, plans


def test_a_plan_that_holds_is_trained(launch: Launch) -> None:
    measure, plans = answering("ran")
    probed = probe_launch(launch, lambda _: None, measure=measure)
    assert probed.holds
    assert probed.steps_down == ()
    assert probed.launch.job.plan == launch.job.plan
    assert probed.launch.job.probed_reserved_bytes == 100 * MIB
    assert len(plans) == 1


def test_out_of_memory_steps_down_and_probes_again(launch: Launch) -> None:
    measure, plans = answering("out_of_memory", "out_of_memory", "ran")
    probed = probe_launch(launch, lambda _: None, measure=measure)
    assert probed.holds
    assert len(plans) == 3
    assert [plan.effective_batch for plan in plans] == [8, 8, 8]
    assert plans[1].micro_batch == 4
    assert probed.launch.job.plan == plans[2]
    assert len(probed.steps_down) == 2
    assert probed.launch.job.probed_reserved_bytes == 100 * MIB
    assert all(plan.seq_len == launch.job.plan.seq_len for plan in plans)


@pytest.mark.parametrize(
    ("answers", "seq_lens", "methods"),
    [
        (None, [1024, 1024], ["lora", "qlora"]),
        ([True, True], [1024, 512, 256], ["lora", "lora", "lora"]),
        ([True, False], [1024, 512, 512], ["lora", "lora", "qlora"]),
        ([False], [1024, 1024], ["lora", "qlora"]),
    ],
    ids=["nobody", "yes", "yes, no", "no"],
)
def test_sequences_are_cut_only_where_somebody_agrees_and_else_the_next_method_is_probed(
    launch: Launch, answers: list[bool] | None, seq_lens: list[int], methods: list[str]
) -> None:
    plan = small_plan(micro_batch=1, seq_len=1024, gradient_checkpointing=True, loss="chunked", optimizer="adamw_8bit")
    measure, plans = answering(*["out_of_memory"] * (len(seq_lens) - 1), "ran")
    asked = iter(answers or [])

    def consents(step: StepDown) -> bool:
        assert step.plan.seq_len < 1024
        return next(asked)

    probed = probe_launch(
        launch.with_plan(plan), lambda _: None, consents=None if answers is None else consents, measure=measure
    )
    assert probed.holds
    assert [plan.seq_len for plan in plans] == seq_lens
    assert [plan.method for plan in plans] == methods
    assert next(asked, None) is None


def test_a_plan_that_was_given_stays_as_it_is(launch: Launch) -> None:
    measure, plans = answering("out_of_memory")
    probed = probe_launch(launch, lambda _: None, measure=measure, steps_down=False)
    assert not probed.holds
    assert len(plans) == 1
    assert "step 1, loss" in probed.message


def test_where_nothing_holds_it_ends(launch: Launch) -> None:
    measure, plans = answering("out_of_memory")
    probed = probe_launch(launch, lambda _: None, measure=measure)
    assert not probed.holds
    assert len(plans) <= MOST_PROBES
    assert probed.launch.job.probed_reserved_bytes is None


def test_a_failure_is_no_reason_for_a_smaller_plan(launch: Launch) -> None:
    measure, plans = answering("failed")
    with pytest.raises(RunFailedError) as caught:
        probe_launch(launch, lambda _: None, measure=measure)
    assert "--no-probe" in caught.value.hint
    assert len(plans) == 1


def test_what_the_estimate_finds_hopeless_is_not_run(launch: Launch) -> None:
    assert not is_hopeless(launch)
    assert is_hopeless(launch.with_plan(small_plan(micro_batch=65_536)))
