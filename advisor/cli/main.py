"""`phi3-advise` itself: detect, compare the three methods, recommend one."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from advisor.advise import DEFAULT_MODEL, Advice, Prefer, Request, advise, proof_command, train_command
from advisor.cli.common import find_gpu, print_json, progress_line
from advisor.errors import InputError
from advisor.hardware import Gpu, Host
from advisor.plan import Method
from advisor.profiles import find_model, profile_of
from advisor.units import parse_count

if TYPE_CHECKING:  # the fast answer imports no more than it uses
    from advisor.cli.probe import Dryness
    from advisor.profiles import ModelSource
    from advisor.traced import TracedPlan


def answer(
    *,
    model: str | None,
    gpu: str | None,
    vram: str | None,
    free: str | None,
    device: str | None,
    method: Method | None,
    seq_len: str | None,
    effective_batch: int | None,
    lora_rank: int | None,
    target_modules: str | None,
    prefer: Prefer | None,
    tokens: str | None,
    trace: bool,
    recipe: str | None,
    save_plan: str | None,
    html: str | None,
    explain: bool,
    as_json: bool,
) -> int:
    """Runs the main command; returns its exit code."""
    settings = {
        "--method": method,
        "--seq-len": seq_len,
        "--effective-batch": effective_batch,
        "--lora-rank": lora_rank,
        "--target-modules": target_modules,
        "--prefer": prefer,
        "--tokens": tokens,
        "--trace": trace or None,
        "--html": html,
        "--explain": explain or None,
    }
    if explain and as_json:
        raise InputError(
            "--explain and --json contradict each other.",
            why="The one explains a screen to a person, the other answers a program.",
            hint="Leave one of them out.",
        )
    if recipe is not None:
        _reject_beside_recipe(settings)
        return _judge_recipe(recipe, find_gpu(gpu=gpu, vram=vram, free=free, device=device), model, save_plan, as_json)
    length = _seq_len(seq_len)
    if seq_len is not None and length is None:
        raise InputError(
            "--seq-len auto needs data.",
            why="It is the data's 95th percentile.",
            hint="Add --launch --data train.jsonl",
        )
    if html is not None:
        from advisor.cli.html import check_page

        check_page(html, save_plan)
    request = _request(length, effective_batch, lora_rank, target_modules, prefer, method, tokens)
    source = find_model(DEFAULT_MODEL if model is None else model)
    profile = profile_of(source)
    target = find_gpu(gpu=gpu, vram=vram, free=free, device=device)
    advice = _with_what_was_measured(advise(profile, target, request, host=_host(target)), source)
    traced: Mapping[Method, TracedPlan] = {}
    if trace:
        from advisor.shortlist import trace_shortlist

        with progress_line() as progress:
            proof = trace_shortlist(advice, source, progress=progress)
        advice, traced = proof.advice, proof.traced
    if save_plan is not None:
        _save(advice, save_plan)
        trains = train_command(save_plan, advice)
        advice = replace(advice, next_command=proof_command(save_plan), proof_command=trains)
    if html is not None:
        from advisor.cli.html import write_page

        write_page(advice, source, html, traced.get(advice.choice.method))
    if explain:
        _show_explained(advice)
    else:
        _show(advice, as_json)
    return 0 if advice.recommended else 1


def launch_advised(
    *,
    model: str | None,
    device: str | None,
    method: Method | None,
    seq_len: str | None,
    effective_batch: int | None,
    lora_rank: int | None,
    target_modules: str | None,
    prefer: Prefer | None,
    save_plan: str | None,
    as_json: bool,
    data: str | None,
    out: str | None,
    dry_run: bool,
    yes: bool,
    fallback: bool,
    epochs: float | None,
    max_steps: int | None,
    learning_rate: float | None,
    packing: bool | None,
    compiled: bool,
    seed: int | None,
    resume: bool,
    skip_bad_rows: bool,
    report_to: tuple[str, ...],
    trust_remote_code: bool,
    debug: bool,
    probe: bool | None,
    refused: tuple[str, ...],
    **_: object,
) -> int:
    """Advises for this machine and this data, and trains; returns the exit code."""
    from advisor.cli.launch import Conduct, conduct, hyperparameters, require_device, resumed

    if refused:
        raise InputError(
            f"{', '.join(refused)} and --launch contradict each other.",
            why="A run trains what this machine's device can hold, and not what another could.",
            hint="Leave them out; to plan for another machine, leave --launch out and add --save-plan plan.toml.",
        )
    how = Conduct(
        dry_run=dry_run,
        yes=yes,
        fallback=fallback,
        as_json=as_json,
        debug=debug,
        save_plan=save_plan,
        probe=probe is not False,
    )
    if resume:
        from advisor.launch.resume import Said

        said = Said(
            data=data,
            length=hyperparameters(epochs=epochs, max_steps=max_steps),
            skip_bad_rows=skip_bad_rows,
            report_to=report_to,
            trust_remote_code=trust_remote_code,
        )
        resolver = resumed(
            out,
            device,
            said,
            model=model,
            method=method,
            seq_len=seq_len,
            effective_batch=effective_batch,
            lora_rank=lora_rank,
            target_modules=target_modules,
            prefer=prefer,
            learning_rate=learning_rate,
            packing=packing,
            compile=compiled or None,
            seed=seed,
            fallback=fallback or None,
        )
        return conduct(resolver, how)
    if data is None:
        raise InputError("--launch needs --data.", hint="phi3-advise --launch --data train.jsonl")
    length = _seq_len(seq_len)
    request = _request(length, effective_batch, lora_rank, target_modules, prefer, method, None)
    gpu = require_device(device)
    from advisor.launch.resolve import Launch, Settings

    settings = Settings(
        data=data,
        out=os.path.expanduser(out) if out is not None else None,
        hyperparameters=hyperparameters(
            epochs=epochs, max_steps=max_steps, learning_rate=learning_rate, seed=seed, compile=compiled or None
        ),
        seq_len=length,
        packing=packing,
        skip_bad_rows=skip_bad_rows,
        report_to=report_to,
        trust_remote_code=trust_remote_code,
    )

    def resolve(progress: Callable[[str], None]) -> Launch:
        from advisor.launch import resolve_advised

        return resolve_advised(model or DEFAULT_MODEL, gpu, request, settings, progress)

    return conduct(resolve, how)


def probe_advised(
    *,
    model: str | None,
    device: str | None,
    method: Method | None,
    seq_len: str | None,
    effective_batch: int | None,
    lora_rank: int | None,
    target_modules: str | None,
    prefer: Prefer | None,
    save_plan: str | None,
    as_json: bool,
    as_gpu: str | None,
    how: Dryness,
    refused: tuple[str, ...],
    **_: object,
) -> int:
    """Measures what is recommended for this machine's device; returns the exit code."""
    from advisor.cli.probe import find_device, run_probe

    if refused:
        raise InputError(
            f"{', '.join(refused)} and --probe contradict each other.",
            why="A probe measures what this machine's device does, and not what another would.",
            hint="Leave them out. To rehearse a smaller GPU on this one: --as t4",
        )
    length = _seq_len(seq_len)
    request = _request(length, effective_batch, lora_rank, target_modules, prefer, method, None)
    gpu, imitation = find_device(device, as_gpu)
    target = gpu if imitation is None else imitation.gpu
    source = find_model(DEFAULT_MODEL if model is None else model)
    advice = advise(profile_of(source), target, request, host=_host(target))
    if save_plan is not None:
        _save(advice, save_plan)
    if advice.recommended is None:
        _show(advice, as_json)
        return 1
    return run_probe(advice.choice.plan, source, gpu, imitation, how)


def _request(
    seq_len: int | None,
    effective_batch: int | None,
    lora_rank: int | None,
    target_modules: str | None,
    prefer: Prefer | None,
    method: Method | None,
    tokens: str | None,
) -> Request:
    return Request(
        seq_len=2048 if seq_len is None else seq_len,
        effective_batch=16 if effective_batch is None else effective_batch,
        lora_rank=16 if lora_rank is None else lora_rank,
        target_modules=_targets(target_modules),
        prefer=prefer or "balanced",
        tokens=parse_count(tokens) if tokens is not None else None,
        method=method,
    )


def _with_what_was_measured(advice: Advice, source: ModelSource) -> Advice:
    """With the speeds that probes measured on this machine."""
    if not advice.gpu.detected:
        return advice
    from advisor.probe.advice import with_measured_speeds

    return with_measured_speeds(advice, source.config)


def _seq_len(text: str | None) -> int | None:
    """A number of tokens; None for auto.

    Raises:
        InputError: neither.
    """
    if text is None or text.strip().lower() == "auto":
        return None
    try:
        return int(text)
    except ValueError as error:
        raise InputError(f"--seq-len {text[:40]!r} is not a number.", hint="Write 2048, or auto.") from error


def _show(advice: Advice, as_json: bool) -> None:
    if as_json:
        from advisor.report.json import advice_object

        print_json(advice_object(advice))
        return
    from advisor.report.terminal import make_console, render_advice

    render_advice(advice, make_console())


def _show_explained(advice: Advice) -> None:
    from advisor.memory.estimate import simulate
    from advisor.report.language import listening
    from advisor.report.terminal import make_console, render_advice
    from advisor.report.terminal.glossary import render_glossary

    console = make_console()
    with listening() as shown:
        render_advice(advice, console)
    part = advice.choice
    # Another tier's memory is not the sum of the closed form's terms.
    ledger = simulate(part.plan, advice.model.architecture, advice.gpu) if part.tier == "estimate" else None
    render_glossary(part, ledger, shown, console)


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
            + (" To trace it, write it down with --save-plan first." if {"--trace", "--html"} & set(given) else ""),
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
