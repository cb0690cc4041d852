"""Report of the benchmark of continual learning: tables, goals and figures of the existing results."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _answers import answers_of
from _continual_figures import draw_averages, draw_certificate, draw_fifty
from _grid import Results, Run
from _paired import METRICS, Difference, paired_difference, standard_error
from _plan import ABLATIONS
from _report import Row, table
from scipy.stats import spearmanr


Result = Mapping[str, Any]
Found = Sequence[tuple[Run, Result]]

COLUMNS = (
    *("method", "runs", "average", "± se", "vs lora", "95 %", "forgetting", "backward", "forward"),
    *("own loss", "trained", "kB per task", "coefficients", "min per run"),
)
FIRST = 10  # number of tasks whose scores are followed while others arrive
POINT = 0.01
ENOUGH = 200  # test examples that a task needs to show a loss of one point
THRESHOLDS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)


@dataclass(frozen=True)
class Loss:
    """Loss of a task's score since it was learned, with the drift that the certificate reports.

    Args:
        stream: Name of the stream.
        task: Name of the task.
        drift: Estimated relative drift of its update, including its own compression error.
        loss: Score when it was learned minus score later.
        examples: Number of its test examples.
        measured: Run and number of tasks at which it was measured.
    """

    stream: str
    task: str
    drift: float
    loss: float
    examples: int
    measured: tuple[str, int]


def print_report(runs: Sequence[Run], results: Results, figures: Path | None) -> None:
    """Print the tables and draw the figures.

    Args:
        runs: Runs to report.
        results: Results of these and other runs.
        figures: Folder for the figures. None draws nothing.
    """
    found = list(results.of(runs))
    compared = [(run, result) for run, result in found if not run.settings.get("validation") and run.stream != "fifty"]
    for stream in dict.fromkeys(run.stream for run, _ in compared):
        of_stream = [(run, result) for run, result in compared if run.stream == stream]
        print(f"\n{stream}\n\n{_aligned([COLUMNS, *_method_lines(of_stream)])}\n\n{table(_goals(stream, of_stream))}")
    chosen = [(run, result) for run, result in found if run.settings.get("validation")]
    if chosen:
        print(f"\nsettings, on held-out training data\n\n{_aligned(_setting_lines(chosen))}")
    hundred = [(run, result) for run, result in found if run.method == "merged"]
    if hundred:
        print(f"\nLoRAs merged ten at a time\n\n{_aligned(_merged_lines(hundred))}")
    many = [(run, result) for run, result in found if run.stream == "fifty" and run.method != "merged"]
    if many:
        print(f"\nfifty tasks\n\n{_aligned(_fifty_lines(many))}")
    losses = list(losses_of(found))
    if losses:
        print(f"\ncertificate and loss\n\n{table(_certificate_rows(losses))}")
    if figures is not None:
        figures.mkdir(parents=True, exist_ok=True)
        _draw_averages(compared, chosen, figures)
        if losses:
            draw_certificate(losses, figures / "certificate.png")
        if many:
            draw_fifty({run.label or run.method: curve_of(run, result) for run, result in many}, figures / "fifty.png")
    versions = {json.dumps(result["versions"], sort_keys=True) for _, result in found}
    if len(versions) > 1:
        print(f"\nresults from {len(versions)} sets of versions:\n" + "\n".join(sorted(versions)))
    missing = results.missing(runs)
    print(f"\n{len(found)} runs, {len(missing)} not run" + "".join(f"\n  {run.name} {run.label}" for run in missing))


def _draw_averages(compared: Found, chosen: Found, figures: Path) -> None:
    """Draw the averages of the methods on each stream, and of the settings that were tried one at a time."""
    of_streams: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run, result in compared:
        of_streams[run.stream][run.method].append(average_of(result))
    for stream, averages in of_streams.items():
        draw_averages(averages, figures / f"{stream}.png", ours="share", against="lora")
    settings = {run.label: [average_of(result)] for run, result in chosen if run.label in ABLATIONS}
    if settings:
        draw_averages(settings, figures / "settings.png", ours="default", against="default")


# ---- Methods side by side -------------------------------------------------------------------------------------------


def _method_lines(found: Found) -> Iterator[tuple[str, ...]]:
    of_methods: dict[str, list[tuple[Run, Result]]] = defaultdict(list)
    for run, result in found:
        of_methods[run.method].append((run, result))
    lines = []
    for method, theirs in of_methods.items():
        averages = [average_of(result) for _, result in theirs]
        error = standard_error(averages)
        difference = against("lora", method, found)
        _, result = theirs[0]
        line = (
            method,
            str(len(theirs)),
            f"{100 * statistics.mean(averages):.2f}",
            "" if error is None else f"{100 * error:.2f}",
            "" if difference is None else f"{100 * difference.mean:+.2f}",
            "" if difference is None else _interval(difference),
            _mean(forgetting_of(result) for _, result in theirs),
            _mean(backward_transfer_of(result) for _, result in theirs),
            "" if method == "lora" else _mean(forward_transfers("lora", method, found)),
            own_loss(result),
            f"{result['trained']:,.0f}",
            f"{stored(result) / len(result['answers']) / 1e3:,.0f}",
            _coefficients_per_task(result),
            f"{statistics.mean(result['seconds'] for _, result in theirs) / 60:.1f}",
        )
        lines.append((statistics.mean(averages), line))
    yield from (line for _, line in sorted(lines, reverse=True))


def _mean(values: Iterable[float | None]) -> str:
    """Return the mean of the known values in points as text, or "" without any."""
    known = [value for value in values if value is not None]
    return f"{100 * statistics.mean(known):.2f}" if known else ""


def _coefficients_per_task(result: Result) -> str:
    """Return the kilobytes of the coefficients of a task, or "" for a method that has none."""
    size = result["bytes"].get("coefficients")
    return "" if size is None else f"{size / len(result['answers']) / 1e3:,.1f}"


def own_loss(result: Result) -> str:
    """Return how much the tasks add to the base model's loss on texts of no task, or "" if that was not measured."""
    if "own_loss" not in result:
        return ""
    return f"{result['own_loss']['with'] - result['own_loss']['without']:+.3f}"


def average_of(result: Result) -> float:
    """Return the mean score over all tasks at the end of a stream."""
    return statistics.mean(scores_of(result, result["answers"]).values())


def scores_of(result: Result, answers: Mapping[str, Any]) -> dict[str, float]:
    """Return the score by task of some answers of a result, such as those of a stage."""
    found, true = answers_of({"answers": answers}), answers_of(result, "true")
    return {
        task: float(METRICS[result["metrics"][task]](found[task], true[task], np.ones((1, len(true[task]))))[0])
        for task in found
    }


def forgetting_of(result: Result) -> float | None:
    """Return the mean over all tasks but the last of the best earlier score minus the score at the end."""
    matrix = result["matrix"]
    if len(matrix) < 2:
        return None
    lost = []
    for j in range(len(matrix) - 1):
        earlier = [row[j] for row in matrix[j:-1] if row[j] is not None]
        if earlier and matrix[-1][j] is not None:
            lost.append(max(earlier) - matrix[-1][j])
    return statistics.mean(lost) if lost else None


def backward_transfer_of(result: Result) -> float | None:
    """Return the mean over all tasks but the last of the score at the end minus the score when learned.

    This is backward transfer as in Lopez-Paz & Ranzato 2017, Eq. 3. None if all tasks were learned at once.
    """
    matrix = result["matrix"]
    changes = [
        matrix[-1][j] - matrix[j][j] for j in range(len(matrix) - 1) if None not in (matrix[-1][j], matrix[j][j])
    ]
    return statistics.mean(changes) if changes else None


def forward_transfers(other: str, method: str, found: Found) -> Iterator[float]:
    """Yield how much better a method learned its tasks than another one that learns each task alone, for each run.

    It is the mean over all tasks but the first of the difference of the scores when learned (the opposite of the
    intransigence of Chaudhry et al. 2018). The score before a task is learned says nothing here, because its head is
    random then.
    """
    for run, ours, theirs in _pairs(other, method, found):
        if len(ours["matrix"]) == len(theirs["matrix"]) > 1:
            alone = scores_of(theirs, theirs["answers"])
            learned = {task: ours["matrix"][j][j] for j, task in enumerate(run.tasks)}
            yield statistics.mean(learned[task] - alone[task] for task in run.tasks[1:])


def against(other: str, method: str, found: Found) -> Difference | None:
    """Compare the averages of two methods over runs of equal seed and, if both have one, order; None without pairs."""
    pairs = list(_pairs(other, method, found))
    if not pairs:
        return None
    runs, ours, theirs = zip(*pairs, strict=True)
    true, metrics = answers_of(ours[0], "true"), ours[0]["metrics"]
    seeds = [run.seed for run in runs]
    return paired_difference(list(map(answers_of, ours)), list(map(answers_of, theirs)), true, metrics, seeds=seeds)


def _pairs(other: str, method: str, found: Found) -> Iterator[tuple[Run, Result, Result]]:
    """Yield the runs of a method with their results and the results of another method to compare them with."""
    results = {(run.order, run.seed): result for run, result in found if run.method == other}
    for run, result in found:
        their = results.get((run.order, run.seed), results.get((None, run.seed)))
        if run.method == method != other and their is not None:
            yield run, result, their


def _interval(difference: Difference) -> str:
    """Return an interval as text, with the number of seeds behind it."""
    seeds = f"{difference.seeds} seed{'s' if difference.seeds > 1 else ''}"
    return f"[{100 * difference.low:+.2f}, {100 * difference.high:+.2f}] of {seeds}"


def stored(result: Result) -> int:
    """Return the bytes needed to run all tasks besides the base model, without cards and figures."""
    return sum(size for kind, size in result["bytes"].items() if kind != "other")


def _goals(stream: str, found: Found) -> Iterator[Row]:
    """Yield the goals of a stream."""
    orders = sorted({run.order for run, _ in found if run.order is not None})
    for order in orders:
        of_order = [(run, result) for run, result in found if run.order in (None, order)]
        name = f"{stream}, order {order}" if len(orders) > 1 else stream
        difference = against("lora", "share", of_order)
        if difference is not None:
            yield Row.at_least(
                f"{name}: share against lora, {_interval(difference)}", 100 * difference.mean, "points", -0.5
            )
            yield Row.at_least(f"{name}: lower end of the interval", 100 * difference.low, "points", -1.5)
        forgotten = [forgetting_of(result) for run, result in of_order if run.method == "share"]
        if forgotten and None not in forgotten:
            yield Row.at_most(f"{name}: forgetting of share", 100 * statistics.mean(forgotten), "points", 0.5)
        for other in ("share-paper", "olora", "osf", "replay-2", "replay-5", "sequential"):
            better = against(other, "share", of_order)
            if better is not None:
                told = f"{name}: share above {other}, {_interval(better)}"
                yield Row.at_least(told, 100 * better.mean, "points", 0)
    coefficients = against("lora", "coefficients", found)
    if coefficients is not None:
        yield Row.at_least(f"{stream}: coefficients against lora", 100 * coefficients.mean, "points", -2)
    yield from _larger_class(found)


def _larger_class(found: Found) -> Iterator[Row]:
    """Yield how far the accuracy on MRPC is above the share of its larger class, which a constant answer reaches."""
    for method in ("share", "lora"):
        above = []
        for run, result in found:
            if run.method == method and "mrpc" in result["answers"]:
                answers, true = answers_of(result)["mrpc"], answers_of(result, "true")["mrpc"]
                above.append(float((answers == true).mean()) - float(max(np.bincount(true.astype(int))) / len(true)))
        if above:
            name = f"mrpc: accuracy of {method} above its larger class"
            value = 100 * statistics.mean(above)
            yield Row.at_least(name, value, "points", 3) if method == "share" else Row(name, value, "points")


# ---- Settings, fifty tasks, the certificate -------------------------------------------------------------------------


def _setting_lines(found: Found) -> list[tuple[str, ...]]:
    shown = [(run, average_of(result), forgetting_of(result)) for run, result in found]
    return [("method", "setting", "average", "forgetting")] + [
        (run.method, run.label, f"{100 * average:.2f}", "" if lost is None else f"{100 * lost:.2f}")
        for run, average, lost in sorted(shown, key=lambda line: (line[0].method, -line[1]))
    ]


def curve_of(run: Run, result: Result) -> dict[int, float]:
    """Return the mean score of the first ten tasks, by number of learned tasks."""
    stages = {int(end): stage["answers"] for end, stage in result.get("stages", {}).items()}
    stages[len(run.tasks)] = result["answers"]
    first = run.tasks[: min(FIRST, *stages)]
    return {
        end: statistics.mean(scores_of(result, {task: answers[task] for task in first}).values())
        for end, answers in sorted(stages.items())
    }


def _fifty_lines(found: Found) -> list[tuple[str, ...]]:
    lines = [("method", "setting", "average", "first ten", "at the end", "kB", "of LoRAs")]
    loras = [stored(result) for run, result in found if run.method == "lora"]
    for run, result in found:
        curve = list(curve_of(run, result).values())
        lines.append(
            (
                run.method,
                run.label,
                f"{100 * average_of(result):.2f}",
                f"{100 * curve[0]:.2f}" if len(curve) > 1 else "",
                f"{100 * curve[-1]:.2f}",
                f"{stored(result) / 1e3:,.0f}",
                f"{stored(result) / loras[0]:.2f}" if loras else "",
            )
        )
    return lines


def _merged_lines(found: Found) -> Iterator[tuple[str, ...]]:
    yield ("setting", "LoRAs", "before", "merged", "mean loss", "of the first ten", "largest", "mean drift", "kB")
    for run, result in found:
        stages = {int(end): stage for end, stage in result["stages"].items()} | {len(result["answers"]): result}
        before = scores_of(result, result["before"])
        first = list(result["before"])[:FIRST]
        for end, stage in sorted(stages.items()):
            now = scores_of(result, stage["answers"])
            lost = {task: before[task] - score for task, score in now.items()}
            yield (
                run.label,
                str(end),
                f"{100 * statistics.mean(before[task] for task in now):.2f}",
                f"{100 * statistics.mean(now.values()):.2f}",
                f"{100 * statistics.mean(lost.values()):.2f}",
                f"{100 * statistics.mean(lost[task] for task in first):.2f}",
                f"{100 * max(lost.values()):.1f}",
                f"{statistics.mean(drift for drift, _ in stage['drift'].values()):.3f}",
                f"{stored(result) / 1e3:,.0f}" if stage is result else "",
            )


def losses_of(found: Found) -> Iterator[Loss]:
    """Yield the loss of every task of every run of Share on test data, with its drift."""
    for run, result in found:
        if run.method == "merged":
            yield from _losses_of_merged(run, result)
            continue
        if "drift" not in result or run.method == "coefficients" or run.settings.get("validation"):
            continue
        now = scores_of(result, result["answers"])
        for j, task in enumerate(run.tasks[:-1]):
            learned = result["matrix"][j][j] if j < len(result["matrix"]) else None
            if learned is not None:
                drift, examples = result["drift"][task][0], len(result["true"][task])
                yield Loss(run.stream, task, drift, learned - now[task], examples, (run.name, len(run.tasks)))


def _losses_of_merged(run: Run, result: Result) -> Iterator[Loss]:
    before = scores_of(result, result["before"])
    for stage in (*result["stages"].values(), result):
        for task, score in scores_of(result, stage["answers"]).items():
            drift, _ = stage["drift"][task]
            where = run.name, len(stage["answers"])
            yield Loss("LoRAs merged", task, drift, before[task] - score, len(result["true"][task]), where)


def _certificate_rows(losses: Sequence[Loss]) -> Iterator[Row]:
    for stream in dict.fromkeys(loss.stream for loss in losses):
        of_stream = [loss for loss in losses if loss.stream == stream]
        drifts, lost = [loss.drift for loss in of_stream], [loss.loss for loss in of_stream]
        if len(set(drifts)) > 1 and len(set(lost)) > 1:
            name = f"{stream}: rank correlation of drift and loss, {len(of_stream)} tasks"
            yield Row.at_least(name, float(spearmanr(drifts, lost).statistic), "", 0.6)
        means = _means(of_stream)
        if len(means) > 2:
            name = f"{stream}: the same of the means over all tasks, {len(means)} times"
            yield Row(name, float(spearmanr(means).statistic), "")
    losses = [loss for loss in losses if loss.examples >= ENOUGH]  # one answer of fewer counts too much
    harmed = [loss.drift for loss in losses if loss.loss > POINT]
    if harmed:
        yield Row("largest drift under which no task lost over a point", min(harmed), "")
    for threshold in THRESHOLDS:
        below = [loss.loss for loss in losses if loss.drift <= threshold]
        if below:
            share = 100 * sum(loss > POINT for loss in below) / len(below)
            yield Row(f"tasks that lost over a point, of {len(below)} with a drift up to {threshold:g}", share, "%")


def _means(losses: Sequence[Loss]) -> list[tuple[float, float]]:
    """Return the mean drift and the mean loss of all tasks, for each time that they were measured together."""
    together: dict[tuple[str, int], list[Loss]] = defaultdict(list)
    for loss in losses:
        together[loss.measured].append(loss)
    return [
        (statistics.mean(loss.drift for loss in group), statistics.mean(loss.loss for loss in group))
        for group in together.values()
    ]


def _aligned(lines: Iterable[Sequence[str]]) -> str:
    lines = list(lines)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 1 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
