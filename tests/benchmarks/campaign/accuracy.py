"""Estimate and trace against what a GPU measured: signed errors, and verdicts at the sizes that cards have."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from advisor.fit import check_fit
from advisor.units import GIB, gib
from campaign.predict import Predicted, Prediction
from campaign.records import Campaign, Record, gpu_of

CAPS_GIB = (8, 12, 16, 24, 40, 80)
TIERS = ("estimate", "trace")

ON_A_PROCESSOR = (
    "A processor, and a small model: that the comparison runs, and no more. The closed form follows a GPU's kernels."
)

Truth = Literal["fits", "does not fit", "open"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Error:
    """One number of one plan; above zero the tier says more than was measured."""

    tier: str
    of: str
    """"allocated in steps", "allocated", "reserved", or a moment."""

    name: str
    method: str
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether one plan fits a card of one size: as a tier says, and as it is."""

    tier: str
    cap_gib: int
    name: str
    said: bool
    truth: Truth

    @property
    def kind(self) -> str:
        """What that is called."""
        if self.truth == "open":
            return "open, said to fit" if self.said else "open, refused"
        if self.said:
            return "rightly fits" if self.truth == "fits" else "false fit"
        return "false refusal" if self.truth == "fits" else "rightly refused"


def whole_card(campaign: Campaign) -> list[Record]:
    """Records that no cap changed."""
    return [record for record in campaign.records if record.cap_bytes is None]


def errors(campaign: Campaign, predicted: Mapping[str, Predicted]) -> Iterator[Error]:
    """Every number that both sides have."""
    for record in whole_card(campaign):
        measured = record.measurement
        if measured.outcome != "ran":
            continue
        for tier in TIERS:
            said: Prediction | None = getattr(predicted[record.name], tier)
            if said is None:
                continue
            pairs = {
                "allocated in steps": (said.step_bytes, measured.step_allocated_bytes),
                "allocated": (said.allocated_bytes, measured.allocated_bytes),
                "reserved": (said.reserved_bytes, measured.reserved_bytes),
                **{moment: (said.moments.get(moment), peak) for moment, peak in measured.moments.items()},
            }
            if campaign.gpu["backend"] == "cpu":
                del pairs["reserved"]
            for of, (one, other) in pairs.items():
                if one is not None and other:
                    yield Error(tier=tier, of=of, name=record.name, method=measured.plan.method, share=one / other - 1)


def settled(campaign: Campaign) -> dict[tuple[str, int], Truth]:
    """What runs under a cap have decided."""
    found: dict[tuple[str, int], Truth] = {}
    for record in campaign.records:
        if record.cap_bytes is not None and record.measurement.outcome in ("ran", "out_of_memory"):
            fits = record.measurement.outcome == "ran"
            found[record.name, record.cap_bytes] = "fits" if fits else "does not fit"
    return found


def truth_at(record: Record, cap_bytes: int, campaign: Campaign, decided: Mapping[tuple[str, int], Truth]) -> Truth:
    """Whether a plan that the whole card measured fits a card of another size.

    It does where its reserved memory and the context do; it does not where even its allocated memory has no room.
    Between the two the allocator gives cached memory back, and only a run under that cap can tell.
    """
    known = decided.get((record.name, cap_bytes))
    if known is not None:
        return known
    measured = record.measurement
    if measured.outcome != "ran":
        return "does not fit" if cap_bytes <= campaign.gpu["total_bytes"] else "open"
    context = campaign.context_bytes or 0
    assert measured.reserved_bytes is not None
    assert measured.allocated_bytes is not None
    if measured.reserved_bytes + context <= cap_bytes:
        return "fits"
    return "does not fit" if measured.allocated_bytes + context > cap_bytes else "open"


def verdicts(
    campaign: Campaign, predicted: Mapping[str, Predicted], caps_gib: Iterable[int] = CAPS_GIB
) -> Iterator[Verdict]:
    """Every plan that ran or ran out of memory, at every cap, by both tiers and with the tool's own margin."""
    decided = settled(campaign)
    for cap_gib in caps_gib:
        gpu = gpu_of(campaign, cap_gib * GIB)
        for record in whole_card(campaign):
            if record.measurement.outcome not in ("ran", "out_of_memory"):
                continue
            truth = truth_at(record, cap_gib * GIB, campaign, decided)
            for tier in TIERS:
                said: Prediction | None = getattr(predicted[record.name], tier)
                if said is not None:
                    fits = check_fit(said.reserved_bytes, gpu).fits
                    yield Verdict(tier=tier, cap_gib=cap_gib, name=record.name, said=fits, truth=truth)


def report(campaign: Campaign, predicted: Mapping[str, Predicted]) -> str:
    """All of it, in Markdown."""
    found, judged = list(errors(campaign, predicted)), list(verdicts(campaign, predicted))
    counted = Counter(record.measurement.outcome for record in whole_card(campaign))
    outcomes = ", ".join(f"{number} {outcome}" for outcome, number in sorted(counted.items()))
    runs = f"{len(campaign.skipped)} skipped; {len(settled(campaign))} run again under a cap."
    versions = ", ".join(f"{name} {version}" for name, version in campaign.environment.items())
    facts = campaign.gpu
    lines = [
        f"{facts['name']}, {gib(facts['total_bytes'])}, driver {facts['driver'] or 'unknown'}; {versions}",
        "",
        f"{len(whole_card(campaign))} plans: {outcomes}; {runs}",
        "",
        *_error_table(found),
        "",
        *_verdict_table(judged),
    ]
    if facts["backend"] == "cpu":
        lines[3:3] = ["", ON_A_PROCESSOR]
    lines += _listed("False fits", [v for v in judged if v.kind == "false fit"])
    refused = [f"- {name}: {why}" for name, said in sorted(predicted.items()) for why in said.refused]
    if refused:
        lines += ["", "Not predicted:", "", *refused]
    return "\n".join(lines)


def _error_table(found: Sequence[Error]) -> list[str]:
    lines = [
        "| of | by | plans | median | mean off | 95th percentile | worst over | worst under |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    groups: dict[tuple[str, str], list[Error]] = {}
    for error in found:
        groups.setdefault((error.of, error.tier), []).append(error)
        if error.of in ("allocated in steps", "reserved"):
            groups.setdefault((f"{error.of}, {error.method}", error.tier), []).append(error)
    for (of, tier), group in groups.items():
        lines.append(f"| {of} | {tier} | {_figures(group)} |")
    for tier in TIERS:
        steps = [error for error in found if error.tier == tier and error.of == "allocated in steps"]
        if steps:
            lines += ["", _worst_under(tier, steps)]
    return lines


def _worst_under(tier: str, steps: Sequence[Error]) -> str:
    worst = min(steps, key=lambda error: error.share)
    if worst.share >= 0:
        return f"The {tier} allocates no less in steps than was measured, of any plan."
    return f"Worst under-prediction of the {tier}: {worst.share:+.2%}, `{worst.name}`."


def _figures(group: Sequence[Error]) -> str:
    """The signed median; the absolute error's mean and 95th percentile; the worst of each sign."""
    shares = [error.share for error in group]
    absolute = sorted(map(abs, shares))
    percentile = absolute[min(len(absolute) - 1, int(0.95 * len(absolute)))]
    over, under = max(0.0, *shares), min(0.0, *shares)
    middle = f"{statistics.median(shares):+.2%} | {statistics.fmean(absolute):.2%} | {percentile:.2%}"
    return f"{len(shares)} | {middle} | {over:+.2%} | {under:+.2%}"


def _verdict_table(judged: Sequence[Verdict]) -> list[str]:
    kinds = (
        *("rightly fits", "rightly refused", "false fit", "false refusal"),
        *("open, said to fit", "open, refused"),
    )
    lines = [
        f"| card | by | {' | '.join(kinds)} |",
        f"| ---: | --- |{' ---: |' * len(kinds)}",
    ]
    for cap_gib in sorted({verdict.cap_gib for verdict in judged}):
        for tier in TIERS:
            count = Counter(v.kind for v in judged if v.cap_gib == cap_gib and v.tier == tier)
            if count:
                lines.append(f"| {cap_gib} GiB | {tier} | {' | '.join(str(count[kind]) for kind in kinds)} |")
    return lines


def _listed(title: str, chosen: Sequence[Verdict]) -> list[str]:
    if not chosen:
        return ["", f"{title}: none."]
    return ["", f"{title}:", "", *(f"- {v.cap_gib} GiB, {v.tier}: `{v.name}`" for v in chosen)]


__all__ = ["CAPS_GIB", "Error", "Verdict", "errors", "report", "settled", "truth_at", "verdicts", "whole_card"]
