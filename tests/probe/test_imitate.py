"""A smaller GPU on a larger one: what is held back, what is refused, what is said."""

from __future__ import annotations

from dataclasses import replace

import pytest

from advisor.errors import InputError, PlanError, UnknownNameError
from advisor.hardware import Gpu
from advisor.probe.imitate import imitate, refuse_what_it_lacks
from advisor.probe.measure import Subject, request_of, without_spill
from advisor.probe.measurement import Measurement
from advisor.profiles import ModelSource, load_gpu, plan_with_defaults
from advisor.units import GIB, MIB

from .conftest import small_plan


def test_a_t4_on_an_h100_has_a_t4s_memory_and_no_flash_attention(h100: Gpu, source: ModelSource) -> None:
    t4 = load_gpu("t4")
    imitation = imitate("t4", h100)
    assert imitation.cap_bytes == t4.usable_bytes - t4.context_bytes
    request = request_of(small_plan(), Subject(model=source, gpu=h100, imitation=imitation))
    assert (request.cap_bytes, request.without_flash, request.device) == (imitation.cap_bytes, True, "cuda")
    assert request.uuid == "GPU-1"
    said = " ".join(imitation.not_imitated)
    for part in ("Speed", "context", "cuBLAS", "bitsandbytes"):
        assert part in said


def test_a_plan_for_it_computes_in_fp16_and_one_in_bfloat16_is_refused(h100: Gpu) -> None:
    imitation = imitate("t4", h100)
    fields = {"model": "phi-3-mini-4k", "method": "qlora"}
    plan = plan_with_defaults(fields, dtype=imitation.gpu.dtype)
    assert (plan.dtype, plan.autocast) == ("float16", "float16")
    refuse_what_it_lacks(plan, imitation)
    with pytest.raises(PlanError, match="dtype"):
        refuse_what_it_lacks(replace(plan, dtype="bfloat16", autocast="none"), imitation)
    with pytest.raises(PlanError, match="attention"):
        refuse_what_it_lacks(replace(plan, attention="flash_attention_2"), imitation)


def test_an_ampere_gpu_keeps_its_flash_attention(h100: Gpu) -> None:
    assert not imitate("rtx-3090", h100).without_flash


def test_no_gpu_stands_in_for_a_larger_or_an_unknown_one(h100: Gpu) -> None:
    with pytest.raises(InputError, match="cannot stand in"):
        imitate("h200", h100)
    busy = replace(h100, free_bytes=4 * GIB)
    with pytest.raises(InputError, match="cannot stand in"):
        imitate("t4", busy)
    with pytest.raises(UnknownNameError):
        imitate("t5", h100)


def test_a_card_stands_in_for_its_own_kind_with_what_it_has(h100: Gpu) -> None:
    """Another driver keeps some MiB more for itself; what others hold is not made up for."""
    smaller = replace(h100, total_bytes=h100.total_bytes - 300 * MIB, free_bytes=h100.total_bytes - 303 * MIB)
    imitation = imitate("h100", smaller)
    assert imitation.cap_bytes == h100.total_bytes - 303 * MIB - h100.context_bytes
    assert imitation.not_imitated == ()
    with pytest.raises(InputError, match="cannot stand in"):
        imitate("h100", replace(smaller, free_bytes=smaller.total_bytes - 8 * GIB))


def test_an_amount_of_memory_is_this_gpu_with_less_of_it(h100: Gpu) -> None:
    imitation = imitate("12GiB", h100)
    assert imitation.cap_bytes == 12 * GIB - h100.context_bytes
    assert not imitation.without_flash
    assert imitation.not_imitated == ()
    with pytest.raises(InputError):
        imitate("100MiB", h100)


def test_on_windows_a_peak_above_dedicated_memory_is_out_of_memory(h100: Gpu) -> None:
    room = h100.total_bytes
    ran = Measurement(outcome="ran", plan=small_plan(), reserved_bytes=room, context_bytes=300 * MIB, at="loss")
    judged = without_spill(ran, h100, spills=True)
    assert judged.outcome == "out_of_memory"
    assert judged.failed_at == "loss"
    assert "host's RAM" in judged.message
    assert without_spill(ran, h100, spills=False) is ran
    below = replace(ran, reserved_bytes=room - 300 * MIB)
    assert without_spill(below, h100, spills=True) is below


def test_a_processor_is_capped_at_the_ram_that_is_free(cpu: Gpu, source: ModelSource) -> None:
    request = request_of(small_plan(), Subject(model=source, gpu=cpu))
    assert request.cap_bytes == 6 * GIB - cpu.context_bytes
    assert request.device == "cpu"
    assert request.uuid is None
