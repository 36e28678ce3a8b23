"""The one sentence and the few numbers that a reader should leave with."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dittocache.quality.metrics import capped
from dittocache.quality.report_caches import CachesSection, VariantSummary
from dittocache.quality.report_data import Report
from dittocache.quality.units import bytes_text, decibels_text, gain_text, plural, ratio_text


@dataclass(frozen=True)
class KeyNumber:
    """A number large enough to be read first, what it is, and what it depends on."""

    value: str
    label: str
    detail: str


def fastest_cached(section: CachesSection) -> VariantSummary | None:
    """The cached variant with the shortest mean wall time; None when nothing was cached."""
    cached = [summary for summary in section.summaries if summary.role == "cached"]
    return min(cached, key=lambda summary: summary.seconds) if cached else None


def against_baseline(section: CachesSection) -> str:
    """How the caches fare against fewer plain steps; empty when that was not measured.

    A cache beats the baseline when it takes no longer and its mean PSNR to the uncached pictures is higher. Where it is
    closer and takes longer, both are said.
    """
    sentences = []
    for baseline in section.summaries:
        if baseline.role != "fewer_steps":
            continue
        closer = [
            summary
            for summary in section.summaries
            if summary.role == "cached" and capped(summary.mean_psnr) > capped(baseline.mean_psnr)
        ]
        if not closer:
            sentences.append(
                f"No cache came closer to the uncached pictures than {baseline.label}: for this model and these "
                "settings, plain sampling with fewer steps is the better bargain."
            )
            continue
        as_fast = [summary for summary in closer if summary.seconds <= baseline.seconds]
        if as_fast:
            best, longer, end = max(as_fast, key=lambda summary: capped(summary.mean_psnr)), "no longer", "."
        else:
            best = min(closer, key=lambda summary: summary.seconds)
            longer, end = f"{best.seconds / baseline.seconds - 1:.0%} longer", ": neither is better in both."
        gain = decibels_text(capped(best.mean_psnr) - capped(baseline.mean_psnr))
        sentences.append(
            f"{best.label} takes {longer} than {baseline.label} and is {gain} closer to the uncached pictures{end}"
        )
    return " ".join(sentences)


def compose_verdict(report: Report) -> str:
    """One sentence made of the sections that are there; an empty string when none of them has a number."""
    clauses = []
    if report.before_after is not None:
        section = report.before_after
        moved = "raises" if section.mean_gain >= 0 else "lowers"
        clauses.append(
            f"the LoRA {moved} PSNR to the target by {decibels_text(abs(section.mean_gain))} "
            f"on {plural(len(section.edits), 'held-out edit')}"
        )
    if report.training_speed is not None:
        section_speed = report.training_speed
        clauses.append(f"a training step on cached embeddings is {ratio_text(section_speed.speedup)} as fast as live")
    fastest = fastest_cached(report.caches) if report.caches is not None else None
    if fastest is not None:
        clauses.append(
            f"sampling with {fastest.label} is {ratio_text(fastest.speedup)} as fast as uncached "
            f"({_quality(fastest)} against it)"
        )
    if report.cached is not None and not clauses:
        clauses.append(f"{plural(report.cached.encoded, 'record')} encoded and {report.cached.reused:,} reused")
    if not clauses:
        return ""
    sentence = clauses[0] if len(clauses) == 1 else ", ".join(clauses[:-1]) + ", and " + clauses[-1]
    return sentence[0].upper() + sentence[1:] + "."


def key_numbers(report: Report) -> list[KeyNumber]:
    """Up to four numbers, one for each section that has one."""
    numbers = []
    if report.before_after is not None:
        section = report.before_after
        numbers.append(
            KeyNumber(
                gain_text(section.mean_gain),
                "PSNR to target with the LoRA",
                f"{decibels_text(section.base_psnr)} \N{RIGHTWARDS ARROW} {decibels_text(section.lora_psnr)}, "
                f"{plural(len(section.edits), 'held-out edit')}",
            )
        )
    fastest = fastest_cached(report.caches) if report.caches is not None else None
    if fastest is not None:
        numbers.append(
            KeyNumber(
                ratio_text(fastest.speedup), "sampling speed", f"{fastest.label}, {_quality(fastest)} to uncached"
            )
        )
    if report.training_speed is not None:
        numbers.append(
            KeyNumber(
                ratio_text(report.training_speed.speedup), "training step speed", "cached against live embeddings"
            )
        )
    if report.cached is not None and report.cached.artifacts:
        cached = report.cached
        label = "records encoded" if cached.encoded else "records encoded again"
        detail = f"{cached.reused:,} reused, {bytes_text(cached.stored_bytes)} stored"
        numbers.append(KeyNumber(f"{cached.encoded:,}", label, detail))
    return numbers


def _quality(summary: VariantSummary) -> str:
    return "identical" if math.isinf(summary.mean_psnr) else f"{decibels_text(summary.mean_psnr)} PSNR"
