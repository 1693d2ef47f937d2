"""How far every method goes on every GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest

from advisor.advise import Request, advise, base_plan
from advisor.hardware import Gpu, what_if
from advisor.plan import METHODS, Method
from advisor.profiles import ModelProfile, all_gpus, load_gpu, load_model
from advisor.search import combinations, evaluate
from advisor.survey import SEQ_LEN_STEP, Reach, measure_reach, survey
from advisor.units import GIB

MINI = load_model("phi-3-mini-4k")


def gpu_named(name: str) -> Gpu:
    return what_if(load_gpu(name))


def fits(method: Method, gpu: Gpu, model: ModelProfile, *, micro_batch: int, seq_len: int) -> bool:
    """Whether any combination of the knobs does at exactly that batch, with gradients of earlier ones kept."""
    base = base_plan(method, model, gpu, Request(seq_len=seq_len))
    return any(
        evaluate(replace(plan, micro_batch=micro_batch), model.architecture, gpu).fit.fits
        for plan in combinations(base, ("sdpa",))
    )


def test_every_gpu_has_a_row_the_smallest_first() -> None:
    rows = survey(MINI)
    assert [row.gpu.name for row in rows] == [gpu.product for gpu in all_gpus()]
    assert all(set(row.reach) == set(METHODS) for row in rows)


def test_what_fits_in_the_survey_is_what_the_advice_says_fits() -> None:
    for name in ("rtx-4060-8gb", "rtx-3080-10gb", "t4", "rtx-4080", "rtx-4090", "a100-40gb", "h100"):
        advice = advise(MINI, gpu_named(name))
        for part in advice.methods:
            reach = measure_reach(part.method, gpu_named(name), MINI, Request())
            assert (reach.micro_batch is not None) == part.fits
            assert reach.in_backward == (part.fits and part.plan.optimizer_in_backward)


REACHES = [
    ("phi-3-mini-4k", "t4", "lora"),
    ("phi-3-mini-4k", "rtx-4060-8gb", "qlora"),
    ("phi-3-mini-4k", "a100-40gb", "full"),
    ("phi-3-medium-4k", "t4", "qlora"),
    ("phi-3-medium-4k", "rtx-2080-ti", "qlora"),
    ("phi-3-medium-4k", "v100-32gb", "lora"),
    ("phi-4", "rtx-4090", "qlora"),
]


@pytest.mark.parametrize(("model_name", "gpu_name", "method"), REACHES)
def test_a_reach_is_the_last_that_fits(model_name: str, gpu_name: str, method: Method) -> None:
    gpu, model = gpu_named(gpu_name), load_model(model_name)
    reach = measure_reach(method, gpu, model, Request())
    assert reach.micro_batch is not None
    assert reach.seq_len is not None
    assert fits(method, gpu, model, micro_batch=reach.micro_batch, seq_len=2048)
    assert not fits(method, gpu, model, micro_batch=reach.micro_batch + 1, seq_len=2048)
    assert reach.seq_len % SEQ_LEN_STEP == 0
    assert fits(method, gpu, model, micro_batch=1, seq_len=reach.seq_len)
    assert not fits(method, gpu, model, micro_batch=1, seq_len=reach.seq_len + SEQ_LEN_STEP)


def test_two_sequences_are_reached_where_one_falls_to_the_math_kernel() -> None:
    model, gpu = load_model("phi-4-mini"), replace(gpu_named("t4"), total_bytes=13 * GIB)
    batches = [n for n in range(1, 8) if fits("lora", gpu, model, micro_batch=n, seq_len=4096)]
    assert 1 not in batches
    assert measure_reach("lora", gpu, model, Request(seq_len=4096)).micro_batch == max(batches)


def test_a_window_is_reached_past_lengths_that_fall_to_the_math_kernel() -> None:
    phi = load_model("phi-4")
    windowed = replace(phi.architecture, window=4000, window_layers=phi.architecture.layers)
    model, gpu = replace(phi, architecture=windowed), replace(gpu_named("t4"), total_bytes=25 * GIB // 2)
    lengths = [n for n in range(256, 8192, 256) if fits("qlora", gpu, model, micro_batch=1, seq_len=n)]
    assert 3840 not in lengths
    assert 4096 in lengths
    assert measure_reach("qlora", gpu, model, Request()).seq_len == max(lengths)


def test_more_memory_reaches_further() -> None:
    def reach(name: str) -> Reach:
        return measure_reach("lora", gpu_named(name), MINI, Request())

    small, large = reach("a100-40gb"), reach("a100-80gb")
    assert small.micro_batch is not None
    assert large.micro_batch is not None
    assert large.micro_batch > small.micro_batch
    assert (large.seq_len or 0) > (small.seq_len or 0)


def test_where_a_method_does_not_fit_it_reaches_nothing() -> None:
    assert measure_reach("full", gpu_named("t4"), MINI, Request()) == Reach(micro_batch=None, seq_len=None)


def test_longer_sequences_and_larger_adapters_leave_room_for_fewer() -> None:
    usual = measure_reach("lora", gpu_named("t4"), MINI, Request()).micro_batch or 0
    longer = measure_reach("lora", gpu_named("t4"), MINI, Request(seq_len=4096)).micro_batch or 0
    larger = measure_reach("lora", gpu_named("t4"), MINI, Request(lora_rank=1024)).micro_batch or 0
    assert 0 < longer < usual
    assert larger < usual
