"""A plan by trace on a GPU: what survives there, and what an advice does with it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from requests_replayed import replay

from advisor import shortlist
from advisor.advise import Advice, Request, advise
from advisor.errors import EnvironmentLacksError, PlanError
from advisor.fit import check_fit
from advisor.hardware import Gpu, what_if
from advisor.memory.allocator import Replay
from advisor.memory.estimate import estimate
from advisor.memory.regime import EXPANDABLE, Regime
from advisor.memory.trace import Allocation, Event, Trace
from advisor.plan import LoraSettings, Plan
from advisor.profiles import ModelSource, find_model, load_gpu, load_model
from advisor.shortlist import MOST_STEPS_DOWN, trace_shortlist
from advisor.traced import TracedPlan, replay_on, require_packages, trace_plan
from advisor.units import GIB, MIB

MINI = load_model("phi-3-mini-4k")
SOURCE = find_model("phi-3-mini-4k")


def trace_of(*requests: tuple[str, int, str], regime: Regime = EXPANDABLE) -> Trace:
    """A trace of named requests: ("a", 30, "loading") takes 30 MiB, and the second time gives it back."""
    live: dict[str, Allocation] = {}
    events = []
    for name, mib, moment in requests:
        freed = name in live
        made = live.pop(name) if freed else Allocation(mib * MIB, (mib,), "uint8", "", name, moment, "activations")
        if not freed:
            live[name] = made
        events.append(Event(made, freed, moment))
    numbered = [(id(event.allocation), event.allocation.nbytes, event.freed) for event in events]
    replayed: dict[str, Replay] = {
        "default": replay(numbered),
        "expandable": replay(numbered, expandable=True),
    }
    return Trace(
        allocated_bytes=replayed["expandable"].allocated_bytes,
        at="forward",
        step_bytes=0,
        loading_bytes=0,
        evaluation_bytes=0,
        saving_bytes=0,
        components={},
        largest=(),
        peaks={},
        moments={},
        total_parameters=0,
        trainable_parameters=0,
        total_bytes=None,
        regime=regime,
        replayed=replayed["expandable" if regime.expandable else "default"],
        events=tuple(events),
        **replayed,
    )


def gpu_with_room(mib: int) -> Gpu:
    gpu = what_if(None, vram_bytes=GIB)
    return replace(gpu, total_bytes=mib * MIB + gpu.context_bytes + 100 * MIB, free_bytes=mib * MIB + gpu.context_bytes)


HOLES = trace_of(("a", 40, "forward"), ("b", 40, "forward"), ("b", 0, "loss"), ("a", 0, "loss"), ("c", 60, "loss"))


def test_room_is_what_context_and_others_leave() -> None:
    survival = replay_on(HOLES, gpu_with_room(500))
    assert survival.room_bytes == 500 * MIB
    assert survival.survives
    assert survival.released_bytes == 0


def test_memory_that_runs_out_says_at_which_moment_and_for_what() -> None:
    survival = replay_on(HOLES, gpu_with_room(60))
    assert not survival.survives
    assert survival.failed_at == "forward"
    assert survival.requested_bytes == 40 * MIB
    assert survival.left_bytes == 20 * MIB


def test_segments_that_are_released_to_survive_are_counted_and_those_after_loading_are_not() -> None:
    loaded = trace_of(
        *(("l", 40, "loading"), ("l", 0, "loading"), ("a", 40, "forward"), ("a", 0, "loss"), ("b", 60, "loss")),
        regime=Regime(expandable=False, empties_cache=True),
    )
    assert replay_on(loaded, gpu_with_room(100)).released_bytes == 0
    pressed = replay_on(loaded, gpu_with_room(80))
    assert pressed.survives
    assert pressed.released_bytes == 40 * MIB


def test_missing_packages_are_those_that_the_plan_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("advisor.traced.find_spec", lambda name: None if name in {"peft", "bitsandbytes"} else name)
    require_packages(Plan(model="m", method="full"))
    with pytest.raises(EnvironmentLacksError) as raised:
        require_packages(Plan(model="m", method="full", optimizer="paged_adamw_8bit"))
    assert raised.value.hint == "pip install bitsandbytes"
    with pytest.raises(EnvironmentLacksError) as raised:
        require_packages(Plan(model="m", method="lora", lora=LoraSettings()))
    assert raised.value.hint == "pip install peft"


def test_what_the_gpu_cannot_run_is_refused_before_anything_runs() -> None:
    plan = Plan(model="phi-3-mini-4k", method="full", attention="flash_attention_2")
    with pytest.raises(PlanError, match="flash_attention_2"):
        trace_plan(plan, SOURCE, what_if(load_gpu("t4")))


class Tracer:
    """Stands in for the trace: the closed form's memory, larger by what a test says."""

    def __init__(self, scale: dict[str, float], limit: int = 0) -> None:
        self.scale, self.limit, self.seen = scale, limit, list[Plan]()

    def __call__(self, plan: Plan, model: ModelSource, gpu: Gpu, *, progress: Any = None) -> TracedPlan:
        progress("step 1")
        self.seen.append(plan)
        memory = estimate(plan, MINI.architecture, gpu)
        scale = self.scale.get(plan.method, 1.0) if plan.micro_batch > self.limit else 1.0
        memory = replace(memory, reserved_bytes=int(memory.reserved_bytes * scale))
        return TracedPlan(
            plan=plan,
            model=model,
            gpu=gpu,
            memory=memory,
            trace=HOLES,
            fit=check_fit(memory.reserved_bytes, gpu),
            survival=None,
            closed_form=None,
            unknown_to_closed_form="",
            warnings=("torch 9.9 was not tested.",),
        )


def shortlisted(monkeypatch: pytest.MonkeyPatch, tracer: Tracer, gpu: str = "t4") -> tuple[Advice, Advice, list[str]]:
    monkeypatch.setattr(shortlist, "trace_plan", tracer)
    told: list[str] = []
    before = advise(MINI, what_if(load_gpu(gpu)), Request())
    return before, trace_shortlist(before, SOURCE, progress=told.append).advice, told


def test_only_what_fits_is_traced_and_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    tracer = Tracer({})
    before, after, told = shortlisted(monkeypatch, tracer)
    assert [plan.method for plan in tracer.seen] == [part.method for part in before.methods if part.fits]
    assert [part.tier for part in after.methods] == ["trace" if part.fits else "estimate" for part in before.methods]
    assert after.recommended == before.recommended
    assert after.choice.plan == before.choice.plan
    assert told[0] == "LoRA: step 1"
    assert after.warnings.count("torch 9.9 was not tested.") == 1


def test_a_plan_that_no_longer_fits_steps_down_in_micro_batch_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    start = advise(MINI, what_if(load_gpu("t4")), Request()).of("lora").plan
    assert start.micro_batch > 1
    tracer = Tracer({"lora": 10.0}, limit=start.micro_batch - 1)
    before, after, _ = shortlisted(monkeypatch, tracer)
    chosen = after.of("lora")
    assert chosen.fits
    assert chosen.plan.micro_batch < start.micro_batch
    assert chosen.plan.effective_batch == start.effective_batch
    said = f"LoRA: by the trace a micro-batch of {start.micro_batch} does not fit; {chosen.plan.micro_batch} does."
    assert said in after.warnings
    assert before.of("lora").speed != chosen.speed


def test_a_method_that_fits_at_no_size_is_no_longer_recommended(monkeypatch: pytest.MonkeyPatch) -> None:
    tracer = Tracer({"lora": 10.0})
    before, after, _ = shortlisted(monkeypatch, tracer)
    assert before.recommended == "lora"
    assert after.recommended == "qlora"
    assert not after.of("lora").fits
    assert any("but not by the trace" in warning for warning in after.warnings)
    assert sum(plan.method == "lora" for plan in tracer.seen) <= 1 + MOST_STEPS_DOWN


def test_where_nothing_fits_the_one_that_misses_least_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shortlist, "trace_plan", tracer := Tracer({}))
    before = advise(MINI, what_if(None, vram_bytes=2 * GIB))
    after = trace_shortlist(before, SOURCE).advice
    assert tracer.seen == [before.choice.plan]
    assert after.recommended is None
    assert after.choice.tier == "trace"
