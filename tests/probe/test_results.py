"""What is kept of probes: whole or absent, per GPU and versions, used by later answers that say so."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from advisor.advise import advise
from advisor.hardware import Gpu
from advisor.probe.advice import with_measured_speeds
from advisor.probe.measurement import Measurement, measurement_of, measurement_values, model_fingerprint
from advisor.probe.results import calibrated, calibration, installed_versions, keep, kept, state_folder
from advisor.profiles import find_model, profile_of
from advisor.units import MIB

from .conftest import SMALL, small_plan


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PHI3_ADVISE_STATE", str(tmp_path))
    return tmp_path


def measured(gpu: Gpu, **fields: Any) -> Measurement:
    base = Measurement(
        outcome="ran",
        plan=small_plan(),
        model=model_fingerprint(SMALL),
        device_name=gpu.name,
        allocated_bytes=100 * MIB,
        reserved_bytes=120 * MIB,
        context_bytes=412 * MIB,
        micro_step_seconds=0.5,
        optimizer_seconds=0.1,
        tokens_a_micro_step=128,
        versions={**installed_versions(), "driver": gpu.driver or ""},
        date="2026-08-01T12:00:00Z",
    )
    return replace(base, **fields)


def test_a_measurement_comes_back_as_it_was(h100: Gpu) -> None:
    one = measured(h100, moments={"loss": 7}, notes=("said",))
    assert measurement_of(json.loads(json.dumps(measurement_values(one)))) == one
    keep(one)
    assert list(kept()) == [one]


@pytest.mark.parametrize(
    "broken",
    [
        "",
        "{",
        "[]",
        "null",
        '{"schema": 2}',
        '{"schema": 1}',
        '{"schema": 1, "outcome": "ran", "plan": {}}',
        "\x00\xff",
    ],
)
def test_a_broken_file_is_passed_over(h100: Gpu, state: Path, broken: str) -> None:
    keep(measured(h100))
    (state / "probes" / "a-broken.json").write_text(broken, encoding="latin-1")
    assert len(list(kept())) == 1
    assert calibration(h100) is not None


@pytest.mark.parametrize("field", ["context_bytes", "micro_step_seconds", "date", "versions", "moments", "notes"])
def test_a_value_of_the_wrong_kind_is_no_measurement(h100: Gpu, field: str) -> None:
    values = json.loads(json.dumps(measurement_values(measured(h100))))
    assert measurement_of({**values, field: {"not": ["it"]} if field != "versions" else 7}) is None or field == "notes"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tokens_a_micro_step", "128"),
        ("tokens_a_micro_step", 1.5),
        ("steps", "3"),
        ("seconds", []),
        ("context_bytes", 412.5),
        ("context_bytes", True),
        ("context_bytes", float("inf")),
        ("micro_step_seconds", float("nan")),
        ("moments", {"loss": "7"}),
        ("at", 7),
        ("as_gpu", ["t4"]),
    ],
)
def test_a_number_that_is_none_is_no_measurement(h100: Gpu, field: str, value: object) -> None:
    values = json.loads(json.dumps(measurement_values(measured(h100))))
    assert measurement_of({**values, field: value}) is None


def test_a_search_does_not_take_the_speed_of_a_whole_probe_away(h100: Gpu) -> None:
    keep(measured(h100, micro_step_seconds=1.5))
    keep(measured(h100, micro_step_seconds=None))
    assert [one.micro_step_seconds for one in kept()] == [1.5]
    keep(measured(h100, micro_step_seconds=None, outcome="out_of_memory"))
    assert [one.outcome for one in kept()] == ["out_of_memory"]


def test_nothing_half_written_is_ever_there(h100: Gpu, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(measured(h100))
    before = list(kept())

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    assert keep(measured(h100, allocated_bytes=1)) is None
    assert list(kept()) == before
    assert [path.suffix for path in (state / "probes").iterdir()] == [".json"]


def test_what_a_killed_process_left_aside_is_removed(h100: Gpu, state: Path) -> None:
    """By its age: another container's process id means nothing here."""
    keep(measured(h100))
    gone, alive = (state / "probes" / f"{name}.json.999999999-0a1b2c3d.part" for name in "xy")
    for path in (gone, alive):
        path.write_text("{")
    os.utime(gone, (0, 0))
    keep(measured(h100))
    assert not gone.exists()
    assert alive.exists()


def test_a_failure_says_nothing_of_the_gpu_and_is_not_kept(h100: Gpu) -> None:
    for outcome in ("failed", "stopped"):
        assert keep(measured(h100, outcome=outcome)) is None
    assert keep(measured(h100, outcome="out_of_memory")) is not None


def test_a_newer_probe_of_the_same_takes_the_place_of_the_older(h100: Gpu) -> None:
    keep(measured(h100))
    keep(measured(h100, context_bytes=500 * MIB, date="2026-08-02T00:00:00Z"))
    assert [one.context_bytes for one in kept()] == [500 * MIB]


def test_the_measured_context_replaces_the_profiles_and_is_said_with_its_date(h100: Gpu) -> None:
    assert calibrated(h100) == h100
    keep(measured(h100))
    gpu = calibrated(h100)
    assert (gpu.context_bytes, gpu.context_provenance) == (412 * MIB, "measured")
    assert "measured here by a probe on 2026-08-01" in gpu.notes[-1]


@pytest.mark.parametrize(
    "other",
    [
        {"device_name": "NVIDIA T4"},
        {"versions": {"torch": "1.0"}},
        {"as_gpu": "t4"},
        {"outcome": "out_of_memory"},
    ],
)
def test_another_gpu_other_versions_and_imitations_do_not_count(h100: Gpu, other: dict[str, Any]) -> None:
    keep(measured(h100, **other))
    assert calibration(h100) is None


def test_another_driver_and_a_gpu_that_is_elsewhere_do_not_count(h100: Gpu) -> None:
    keep(measured(h100))
    assert calibration(replace(h100, driver="590.2")) is None
    assert calibration(replace(h100, detected=False)) is None


def test_a_measured_speed_is_scaled_to_the_plans_accumulation(h100: Gpu) -> None:
    plan = small_plan(gradient_accumulation=2)
    keep(measured(h100, plan=plan))
    known = calibration(h100)
    assert known is not None
    longer = known.speed_of(replace(plan, gradient_accumulation=8, model="elsewhere/config.json"), SMALL)
    assert longer is not None
    assert longer.seconds_per_step == pytest.approx(8 * 0.5 + 0.1)
    assert longer.tokens_per_second == pytest.approx(8 * 128 / 4.1)
    assert known.speed_of(replace(plan, micro_batch=4), SMALL) is None
    assert known.speed_of(plan, {**SMALL, "hidden_size": 512}) is None


def test_a_probe_of_shorter_rows_says_nothing_of_the_plans_speed_and_takes_no_place(h100: Gpu) -> None:
    plan = small_plan(seq_len=1024)
    full = measured(h100, plan=plan, tokens_a_micro_step=2048)
    keep(full)
    keep(replace(full, tokens_a_micro_step=200, date="2026-08-02T00:00:00Z"))
    assert len(list(kept())) == 2
    known = calibration(h100)
    assert known is not None
    assert known.speed_of(plan, SMALL) == full
    # A batch of such rows is padded to the plan's length.
    almost = replace(full, tokens_a_micro_step=2 * 1000, date="2026-08-03T00:00:00Z")
    keep(almost)
    assert [one.tokens_a_micro_step for one in kept()] == [200, 2000]
    later = calibration(h100)
    assert later is not None
    assert later.speed_of(plan, SMALL) == almost


def test_an_advice_uses_the_speed_that_was_measured_and_says_so(h100: Gpu) -> None:
    source = find_model("phi-3-mini-4k")
    advice = advise(profile_of(source), h100)
    assert with_measured_speeds(advice, source.config) == advice
    plan = advice.of("lora").plan
    tokens = plan.micro_batch * plan.seq_len
    keep(measured(h100, plan=plan, model=model_fingerprint(source.config), tokens_a_micro_step=tokens))
    timed = with_measured_speeds(advice, source.config)
    speed = timed.of("lora").speed
    assert speed is not None
    assert speed.measured
    assert speed.step_seconds == pytest.approx(plan.gradient_accumulation * 0.5 + 0.1)
    assert "2026-08-01" in speed.basis
    assert any("The speed of LoRA was measured here by a probe on 2026-08-01" in said for said in timed.warnings)
    full = timed.of("full").speed
    assert full is not None
    assert not full.measured


def test_the_state_folder_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PHI3_ADVISE_STATE")
    assert "phi3-advise" in state_folder()
