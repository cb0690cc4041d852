"""Sentences that describe a survey of a collection."""

from __future__ import annotations

from collections.abc import Sequence

from .collection import Advice, CollectionReport


_SHOWN = 8  # largest number of adapters named in a sentence


def survey_sentences(report: CollectionReport) -> tuple[str, ...]:
    """Describe the findings of a survey in plain language, in one or two sentences each."""
    return tuple(
        sentence
        for sentence in (
            _of_the_curve(report),
            *map(_of_advice, report.advice if report.curve else ()),
            _of_badly_served(report),
            _of_groups(report.duplicates, "The same adapter", "Keep one of each"),
            _of_groups(report.near_duplicates, "Nearly the same adapter", "They count as several in the basis"),
        )
        if sentence
    )


def _of_the_curve(report: CollectionReport) -> str:
    if not report.curve:
        return ""
    first, last = report.curve[0], report.curve[-1]
    text = (
        f"From k = {first.num_components} to k = {last.num_components} the explained variance goes from "
        f"{_percent(first.explained)} to {_percent(last.explained)} (random directions: "
        f"{_percent(first.null_explained)} to {_percent(last.null_explained)})."
    )
    if report.sampled:
        adapters = (
            f"{report.curve_tasks} of {report.tasks}" if report.curve_tasks < report.tasks else f"all {report.tasks}"
        )
        text += (
            f" The curve and its null are from a sample: {adapters} adapters in {len(report.curve_modules)} of "
            f"{report.modules} modules. The rest is based on all adapters."
        )
    return text


def _of_advice(advice: Advice) -> str:
    target = f"a mean error of {advice.target_error:g}"
    if advice.num_components is None:
        return f"No k of the curve reaches {target}."
    return (
        f"For {target} take k = {advice.num_components} and p = {advice.pseudo_rank}: error {advice.error:.2g}, "
        f"{_size(advice.bytes)} in all."
    )


def _of_badly_served(report: CollectionReport) -> str:
    if not report.badly_served:
        return ""
    worst = report.badly_served[0]
    return (
        f"{len(report.badly_served)} of {report.tasks} adapters are served badly at k = {report.num_components} and "
        f"are better stored separately: {_names(report.badly_served)} (the worst has an error of "
        f"{report.errors[worst]:.2g})."
    )


def _of_groups(groups: Sequence[Sequence[str]], what: str, advice: str) -> str:
    if not groups:
        return ""
    shown = "; ".join(_names(group) for group in groups[:_SHOWN])
    more = f"; and {len(groups) - _SHOWN} more groups" if len(groups) > _SHOWN else ""
    return f"{what}: {shown}{more}. {advice}."


def _names(tasks: Sequence[str]) -> str:
    shown = ", ".join(tasks[:_SHOWN])
    return f"{shown} and {len(tasks) - _SHOWN} more" if len(tasks) > _SHOWN else shown


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.0f} %"


def _size(count: int) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
