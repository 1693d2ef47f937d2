"""`phi3-advise` itself: detect, compare the three methods, recommend one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace

from advisor.advise import DEFAULT_MODEL, Advice, Prefer, Request, advise, proof_command
from advisor.cli.common import find_gpu, print_json, progress_line
from advisor.errors import InputError
from advisor.hardware import Gpu, Host
from advisor.profiles import find_model, profile_of
from advisor.units import parse_count


def answer(
    *,
    model: str | None,
    gpu: str | None,
    vram: str | None,
    free: str | None,
    device: int | None,
    seq_len: int | None,
    effective_batch: int | None,
    lora_rank: int | None,
    target_modules: str | None,
    prefer: Prefer | None,
    tokens: str | None,
    trace: bool,
    recipe: str | None,
    save_plan: str | None,
    as_json: bool,
) -> int:
    """Runs the main command; returns its exit code."""
    settings = {
        "--seq-len": seq_len,
        "--effective-batch": effective_batch,
        "--lora-rank": lora_rank,
        "--target-modules": target_modules,
        "--prefer": prefer,
        "--tokens": tokens,
        "--trace": trace or None,
    }
    if recipe is not None:
        _reject_beside_recipe(settings)
        return _judge_recipe(recipe, find_gpu(gpu=gpu, vram=vram, free=free, device=device), model, save_plan, as_json)
    request = Request(
        seq_len=2048 if seq_len is None else seq_len,
        effective_batch=16 if effective_batch is None else effective_batch,
        lora_rank=16 if lora_rank is None else lora_rank,
        target_modules=_targets(target_modules),
        prefer=prefer or "balanced",
        tokens=parse_count(tokens) if tokens is not None else None,
    )
    source = find_model(DEFAULT_MODEL if model is None else model)
    profile = profile_of(source)
    target = find_gpu(gpu=gpu, vram=vram, free=free, device=device)
    advice = advise(profile, target, request, host=_host(target))
    if trace:
        from advisor.shortlist import trace_shortlist

        with progress_line() as progress:
            advice = trace_shortlist(advice, source, progress=progress)
    if save_plan is not None:
        _save(advice, save_plan)
        advice = replace(advice, next_command=proof_command(save_plan), proof_command="")
    _show(advice, as_json)
    return 0 if advice.recommended else 1


def _show(advice: Advice, as_json: bool) -> None:
    if as_json:
        from advisor.report.json import advice_object

        print_json(advice_object(advice))
        return
    from advisor.report.terminal import make_console, render_advice

    render_advice(advice, make_console())


def _targets(text: str | None) -> str | tuple[str, ...]:
    if text is None or text.strip() == "all-linear":
        return "all-linear"
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _host(gpu: Gpu) -> Host | None:
    """This machine's RAM, where the GPU is in this machine."""
    if not gpu.detected:
        return None
    from advisor.hardware import host

    return host()


def _reject_beside_recipe(settings: Mapping[str, object]) -> None:
    given = [name for name, value in settings.items() if value is not None]
    if given:
        raise InputError(
            f"--recipe and {', '.join(given)} contradict each other.",
            why="A recipe is judged as it stands: it says its own settings.",
            hint="Leave one of them out; --model, --gpu, --vram and --free go with a recipe."
            + (" To trace it, write it down with --save-plan first." if "--trace" in given else ""),
        )


def _judge_recipe(name: str, gpu: Gpu, model: str | None, save_plan: str | None, as_json: bool) -> int:
    from advisor.profiles import load_recipe
    from advisor.recipes import examine_recipe

    judged = examine_recipe(load_recipe(name), gpu, model=model)
    if save_plan is not None:
        from advisor.profiles import save_plan_file

        save_plan_file(judged.plan, save_plan)
    if as_json:
        from advisor.report.json import recipe_object

        print_json(recipe_object(judged))
    else:
        from advisor.report.terminal import make_console, render_recipe

        render_recipe(judged, make_console())
    return 0 if judged.fit.fits else 1


def _save(advice: Advice, path: str) -> None:
    if advice.recommended is None:
        raise InputError(
            "There is no plan to save: nothing fits.", hint=f"Try: {advice.next_command}", why=advice.reason
        )
    from advisor.profiles import save_plan_file

    save_plan_file(advice.choice.plan, os.path.expanduser(path))
