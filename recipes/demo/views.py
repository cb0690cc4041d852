"""What the demo shows, as HTML. Names and texts come from anywhere, so all of them are escaped."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from html import escape
from pathlib import PurePath

from answering import BASE, Answer, Answered, Line, Route
from subspaces import Audit, Matrix, Summary, TaskFacts

from share_hf.cli.tables import count, drift, size


LABELS_SHOWN = 6

CSS = """
.gradio-container .html-container { padding: 0; }
.gradio-container #examples :is(th, td) { text-align: left; }
.share-cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; }
.share-card { border: 1px solid var(--border-color-primary); border-radius: var(--radius-lg); padding: .7rem .9rem;
  background: var(--block-background-fill); min-width: 0; }
.share-card b { display: block; font-size: 1.25rem; line-height: 1.5; overflow: hidden; text-overflow: ellipsis; }
.share-card span, .share-note { color: var(--body-text-color-subdued); font-size: .85rem; }
.share-note { margin: .3rem 0; }
.share-problem { border-left: 4px solid #d97706; background: var(--background-fill-secondary); padding: .7rem .9rem;
  border-radius: var(--radius-md); overflow-wrap: anywhere; }
.share-scroll { overflow-x: auto; }
.share-scroll table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
.gradio-container .share-scroll :is(table, tr) { border: 0; }
.share-scroll th, .share-scroll td { padding: .4rem .7rem; border: 0;
  border-bottom: 1px solid var(--border-color-primary); text-align: right; white-space: nowrap; }
.share-scroll th { font-weight: 600; color: var(--body-text-color-subdued); }
.share-scroll th:first-child, .share-scroll td:first-child, .share-scroll .left { text-align: left; }
.share-scroll td.wrap { white-space: normal; overflow-wrap: anywhere; min-width: 12rem; }
.share-scroll.matrix table { width: auto; }
.share-scroll.matrix :is(th, td):not(:first-child) { text-align: center; min-width: 3.6rem; }
.share-answer { border: 1px solid var(--border-color-primary); border-radius: var(--radius-lg); padding: 1rem;
  background: var(--block-background-fill); }
.share-answer h4 { margin: 0 0 .4rem; color: var(--body-text-color-subdued); font-weight: 600; font-size: .9rem; }
.share-answer p.main { font-size: 1.5rem; font-weight: 600; margin: 0 0 .6rem; overflow-wrap: anywhere; }
.share-answer p.text { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font-size: 1.1rem; }
.share-bar { display: grid; grid-template-columns: minmax(5rem, 12rem) 1fr 3.5rem; gap: .6rem; align-items: center;
  margin: .25rem 0; font-size: .9rem; }
.share-bar i { display: block; height: .6rem; border-radius: .3rem; background: var(--color-accent); min-width: 2px; }
.share-bar u { display: block; border-radius: .3rem; background: var(--border-color-primary); text-decoration: none; }
.share-bar span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.share-bar em { font-style: normal; text-align: right; font-variant-numeric: tabular-nums; }
.share-dark { color: #fff; }
"""


def problem(message: str) -> str:
    """Return a message about something that did not work."""
    return f'<div class="share-problem" role="alert">{escape(message)}</div>'


def note(text: str) -> str:
    """Return an explanation in small print."""
    return f'<p class="share-note">{escape(text)}</p>'


def score(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def percent(fraction: float) -> str:
    """Return a percentage without decimals; what is not quite all is not shown as all."""
    return "over 99 %" if 0.995 <= fraction < 1 - 1e-9 else f"{100 * fraction:.0f} %"


def summary(facts: Summary) -> str:
    """Return the sizes of a subspace as cards, and what it lacks."""
    low, high = facts.directions
    directions = str(high) if low == high else f"{low}–{high}"
    name = PurePath(facts.base_model).name if facts.base_model else "unnamed"
    cards = [
        (str(facts.tasks), "task" if facts.tasks == 1 else "tasks"),
        (name, "base model"),
        (
            size(facts.basis_bytes + facts.task_bytes),
            f"{size(facts.basis_bytes)} of bases and {size(facts.task_bytes)} of tasks",
        ),
        (size(facts.lora_bytes), "if each task were a LoRA of its own"),
        (
            f"k = {directions}, p = {facts.pseudo_rank}",
            f"directions of each of {facts.modules} layers, rank of a task",
        ),
    ]
    shown = "".join(
        f'<div class="share-card"><b title="{escape(value)}">{escape(value)}</b><span>{escape(title)}</span></div>'
        for value, title in cards
    )
    return f'<div class="share-cards">{shown}</div>{"".join(map(note, facts.missing))}'


def task_table(tasks: Sequence[TaskFacts]) -> str:
    """Return one page of the table of tasks."""
    if not tasks:
        return note("No task has such a name.")
    columns: list[tuple[str, Callable[[TaskFacts], str], bool]] = [
        ("task", lambda task: task.name, True),
        ("learned by", lambda task: task.learned_by, True),
        ("labels", _labels, any(task.has_head for task in tasks)),
        ("size", lambda task: size(task.size), True),
        ("drift", lambda task: drift(task.drift), True),
        ("bound", lambda task: drift(task.bound), True),
        ("score", lambda task: task.metric, any(task.learned is not None for task in tasks)),
        ("when learned", lambda task: score(task.learned), any(task.learned is not None for task in tasks)),
        ("now", lambda task: score(task.now), any(task.learned is not None for task in tasks)),
        ("route", lambda task: "yes" if task.has_route else "–", any(task.has_route for task in tasks)),
    ]
    columns = [column for column in columns if column[2]]
    header = [title for title, _, _ in columns]
    rows = [[cell(task) for _, cell, _ in columns] for task in tasks]
    return _table(header, rows, left=("learned by", "labels"))


def _labels(task: TaskFacts) -> str:
    if task.labels:
        more = len(task.labels) - 3
        return ", ".join(task.labels[:3]) + (f" and {more} more" if more > 0 else "")
    return "not named" if task.has_head else "–"


def means(facts: Summary) -> str:
    """Return the means over the stream."""
    titles = {
        "average": "mean score of all tasks now",
        "forgetting": "forgetting: best score before, minus now",
        "backward_transfer": "backward transfer: now, minus when learned",
        "forward_transfer": "forward transfer: effect on the next task",
    }
    shown = "".join(
        f'<div class="share-card"><b>{score(value)}</b><span>{titles[name]}</span></div>'
        for name, value in facts.means.items()
    )
    return f'<div class="share-cards">{shown}</div>' if shown else ""


def matrix(scores: Matrix | None) -> str:
    """Return the scores as a table, the higher the darker."""
    if scores is None:
        return note("This subspace has no scores. ShareTrainer measures them where tasks have evaluation data.")
    head = "".join(f"<th>{escape(name)}</th>" for name in scores.columns)
    body = "".join(f"<tr><td>{escape(name)}</td>{''.join(map(_cell, values))}</tr>" for name, values in scores.rows)
    return (
        f'<div class="share-scroll matrix"><table><thead><tr><th>after learning</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _cell(value: float | None) -> str:
    if value is None:
        return "<td></td>"
    strength = min(1.0, max(0.0, value))
    dark = ' class="share-dark"' if strength > 0.6 else ""
    return f'<td{dark} style="background: rgba(79, 70, 229, {strength:.2f})">{value:.3f}</td>'


def audit(found: Audit) -> str:
    """Return the sentences of an audit and its numbers for each layer."""
    report = found.report
    if report is None:
        return note(f"There is nothing to audit: {found.reason}")
    sentences = "".join(f"<p>{escape(sentence)}</p>" for sentence in report.sentences())
    rows = [
        [row.module, str(max(row.num_components)), percent(row.observed.joint), percent(row.null.joint)]
        for row in report.rows
    ]
    part = (
        "" if len(rows) == found.layers else f"{len(rows)} of {found.layers} layers; share-hf audit has all of them."
    )
    return sentences + _table(["layer", "k", "explained", "by chance"], rows) + (note(part) if part else "")


def answer(given: Answer, route: Route | None = None) -> str:
    """Return the answer of a task to a text, and how the router came to it."""
    name = "base model" if given.task == BASE else given.task
    parts = [f'<div class="share-answer"><h4>{escape(name)}</h4>']
    if given.text is not None:
        parts.append(f'<p class="text">{escape(given.text) or "<em>nothing</em>"}</p>')
    else:
        parts.append(f'<p class="main">{escape(given.short())}</p>')
    parts += [_bar(label, probability) for label, probability in given.labels[:LABELS_SHOWN]]
    if (more := len(given.labels) - LABELS_SHOWN) > 0:
        parts.append(note(f"and {more} less likely labels"))
    if route is not None:
        chose = (
            f"The router chose {route.task}. Probabilities:"
            if route.task is not None
            else "To the router, this text is like those of no task, so the base model answers. Nearest tasks:"
        )
        parts += [note(chose), *(_bar(task, probability) for task, probability in route.nearest)]
    return "".join([*parts, "</div>"])


def _bar(name: str, fraction: float) -> str:
    return (
        f'<div class="share-bar"><span title="{escape(name)}">{escape(name)}</span>'
        f'<u><i style="width: {100 * fraction:.1f}%"></i></u><em>{100 * fraction:.1f} %</em></div>'
    )


def batch(lines: Sequence[Line], answered: Answered) -> str:
    """Return the answers to the lines of a mixed batch."""
    rows = []
    for line, given, route in zip(lines, answered.answers, answered.routes, strict=True):
        task = ("base model" if given.task == BASE else given.task) + (" (router)" if route is not None else "")
        likely = f"{100 * given.labels[0][1]:.1f} %" if len(given.chosen) == 1 else "–"
        rows.append([line.text, task, given.short(), likely])
    tasks = len({given.task for given in answered.answers})
    asked = f"{count(len(lines), 'text')} and {count(tasks, 'task')}"
    took = f"{asked} in one pass of the model, which took {1000 * answered.seconds:.0f} ms."
    header = ["text", "task", "answer", "probability"]
    if not any(given.labels for given in answered.answers):
        header, rows = header[:-1], [row[:-1] for row in rows]
    return _table(header, rows, left=("task", "answer"), wrap=("text", "answer")) + note(took)


def _table(
    header: Sequence[str], rows: Iterable[Sequence[str]], *, left: Collection[str] = (), wrap: Collection[str] = ()
) -> str:
    """Return a table of columns that are aligned to the right, except the first one.

    Args:
        header: Titles of the columns.
        rows: Cells of each row.
        left: Titles of columns to align to the left.
        wrap: Titles of columns of long texts.
    """
    kinds = ["left " * (title in left) + "wrap" * (title in wrap) for title in header]

    def line(tag: str, cells: Sequence[str]) -> str:
        pairs = zip(kinds, cells, strict=True)
        return "".join(["<tr>", *(f'<{tag} class="{kind}">{escape(cell)}</{tag}>' for kind, cell in pairs), "</tr>"])

    body = "".join(line("td", row) for row in rows)
    return f'<div class="share-scroll"><table><thead>{line("th", header)}</thead><tbody>{body}</tbody></table></div>'
