"""A page that shows a shared subspace: its tasks, sizes, drift, scores and audit, and the answers of its tasks.

    python recipes/demo/app.py
    python recipes/demo/app.py --subspace org/share-subspace
    python recipes/demo/app.py --subspace share-subspace --base-model path/to/the/base

A Space runs it without arguments and sets the variables that stand for them. Gradio's own variables, such as
GRADIO_SERVER_PORT, decide where the page is served.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import subspaces
import views
from answering import Line, parsed
from desk import Desk, Opened
from subspaces import TASKS_ON_A_PAGE, DemoError, matching, nearby, page_of
from transformers.utils import logging


AUTOMATIC, NOTHING = "automatic", "nothing"  # after a text in a prompt
NONE = "no other task"  # in the menu of the task to compare with; no task has a name with spaces

TITLE = """# Shared subspace
Many fine-tuned tasks of one model, kept as one low-rank basis a layer and a few kilobytes a task."""
ABOUT_TASKS = (
    "Drift: how far a task's weights are from those that were learned, relative to their size, after compression and "
    "all later merges. Bound: a certified limit of the drift in any one layer."
)
ABOUT_SCORES = (
    "Each row is a step of training, each column a task. A task is forgotten if its numbers fall from the diagonal "
    "downwards."
)
ABOUT_AUDIT = (
    "Do the tasks share a subspace? The audit compares how much of their updates the bases explain with how much they "
    "would explain of random ones. Adapters also look alike if their training began with the same random factor A."
)
ABOUT_BATCH = (
    "Write one text a line, as “task: text”. All of them go through the model in one pass, each with its own task. "
    "The router, if there is one, finds the task of a line that names none."
)
PAIRS = "For a pair of texts, as in paraphrase tasks, write ||| between them."

# Only fonts of the visitor's own machine: the page makes no request to another host.
THEME = gr.themes.Soft(
    primary_hue="indigo",
    secondary_hue="indigo",
    neutral_hue="slate",
    font=["ui-sans-serif", "system-ui", "sans-serif"],
    font_mono=["ui-monospace", "Consolas", "monospace"],
)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line. The environment has the defaults."""
    parser = argparse.ArgumentParser(description="Show a shared subspace on a page.")
    parser.add_argument(
        "--subspace",
        default=os.environ.get("SHARE_HF_SUBSPACE"),
        help="folder or Hub id to open first (SHARE_HF_SUBSPACE; if neither is given, one below the current folder)",
    )
    parser.add_argument(
        "--base-model",
        default=os.environ.get("SHARE_HF_BASE_MODEL", ""),
        help="folder or Hub id of its base model, if not the one that the subspace names (SHARE_HF_BASE_MODEL)",
    )
    parser.add_argument(
        "--examples",
        type=Path,
        default=Path(os.environ.get("SHARE_HF_EXAMPLES") or Path(__file__).parent / "examples.txt"),
        help="file of lines “task: text” to offer (SHARE_HF_EXAMPLES; by default those of the quickstart's tasks)",
    )
    return parser.parse_args(argv)


class Page:
    """The page while it is built. Each tab refreshes itself when a subspace has been opened.

    Args:
        options: Result of `arguments`.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.desk = options, Desk()

    def build(self) -> gr.Blocks:
        """Return the page."""
        local = nearby(Path())
        first = self.options.subspace or next(iter(local), "")
        with gr.Blocks(title="Shared subspace", analytics_enabled=False) as page:
            self.place = gr.State("")
            gr.Markdown(TITLE)
            with gr.Row(equal_height=True):
                choice = gr.Dropdown(
                    list(dict.fromkeys(filter(None, [first, *local]))),
                    value=first or None,
                    label="Subspace: a folder, or an id on the Hub",
                    allow_custom_value=True,
                )
                button = gr.Button("Open", variant="primary", scale=0, min_width=110)
            status = gr.HTML()
            self.opening = gr.on(
                [page.load, button.click], self._open, choice, [self.place, status], api_visibility="private"
            )
            self.settings = self._settings()
            with gr.Tabs(visible=False) as tabs:
                with gr.Tab("Tasks"):
                    self._tasks()
                with gr.Tab("Scores"):
                    self._scores()
                with gr.Tab("Audit"):
                    self._audit()
                with gr.Tab("Ask"):
                    self._ask()
                with gr.Tab("Mixed batch"):
                    self._mixed_batch()
            self.opening.then(
                lambda place: gr.Tabs(visible=bool(place)),
                self.place,
                tabs,
                show_progress="hidden",
                api_visibility="private",
            )
        return page

    def _open(self, place: str | None) -> tuple[str, str]:
        try:
            found = self.desk.open(place or "")
        except DemoError as error:
            return "", views.problem(str(error))
        return found.place, views.summary(found.summary)

    def _tasks(self) -> None:
        gr.HTML(views.note(ABOUT_TASKS))
        search = gr.Textbox(placeholder="Search by name", show_label=False, container=False)

        def table(found: Opened, page: int, typed: str) -> tuple[str, int, int]:
            tasks, page, pages = page_of(matching(found.tasks, typed), page, TASKS_ON_A_PAGE)
            return views.task_table(tasks), page, pages

        self._paged(table, search)

    def _scores(self) -> None:
        about, means = gr.HTML(views.note(ABOUT_SCORES)), gr.HTML()

        def matrix(found: Opened, page: int) -> tuple[str, int, int]:
            scores, page, pages = subspaces.matrix_of(found.subspace, page)
            return views.matrix(scores), page, pages

        self._paged(matrix)
        self._when_opened(lambda found: (gr.HTML(visible=found.is_scored), views.means(found.summary)), [about, means])

    def _audit(self) -> None:
        gr.HTML(views.note(ABOUT_AUDIT))
        with gr.Row():
            button = gr.Button("Run the audit", variant="primary", scale=0, min_width=160)
        result = gr.HTML()

        def audited(place: str) -> str:
            return shown(lambda: views.audit(subspaces.audit(self.desk.get(place).subspace)))

        button.click(audited, self.place, result, api_visibility="private")
        self._when_opened(lambda found: "", result)

    def _settings(self) -> list[gr.components.Component]:
        with gr.Accordion("Model and prompt", open=False):
            base = gr.Textbox(
                self.options.base_model,
                label="Base model",
                info="Its folder or Hub id, if it is not the one that the subspace names",
            )
            with gr.Row() as of_language_models:
                after = gr.Dropdown(
                    [AUTOMATIC, NOTHING, r"\nAnswer:"],
                    value=AUTOMATIC,
                    label="What follows a text in the prompt",
                    info=r"automatic: nothing in a chat, \nAnswer: otherwise",
                    allow_custom_value=True,
                )
                longest = gr.Slider(1, 256, 32, step=1, label="Longest answer", info="In tokens")
        self._when_opened(lambda found: gr.Row(visible=found.may_generate), of_language_models)
        return [base, after, longest]

    def _ask(self) -> None:
        text = gr.Textbox(label="Text", lines=3, info=PAIRS, elem_id="text")
        with gr.Row():
            task = gr.Dropdown(label="Task", allow_custom_value=True)
            other = gr.Dropdown(label="Compare with", allow_custom_value=True)
        with gr.Row():
            button = gr.Button("Ask", variant="primary", scale=0, min_width=160)
        with gr.Row():
            answer, other_answer = gr.HTML(), gr.HTML(visible=False)
        examples = gr.Dataset(
            components=["textbox", "textbox"],
            headers=["Task", "Text"],
            label="Examples",
            visible=False,
            elem_id="examples",
        )

        def opened(found: Opened) -> tuple[Any, ...]:
            offered, menu = found.examples(self.options.examples), found.menu()
            return (
                gr.Textbox(""),
                gr.Dropdown(menu, value=menu[0][1]),
                gr.Dropdown([(NONE, NONE), *menu], value=NONE),
                "",
                gr.HTML("", visible=False),
                gr.Dataset(samples=[[line.task, line.text] for line in offered], visible=bool(offered)),
            )

        def asked(place: str, said: str, first: str, second: str, *settings: Any) -> tuple[Any, Any]:
            tasks = [first or "", *([second] if second and second != NONE else [])]
            try:
                given = ask(self.desk.get(place), [Line(said, name) for name in tasks], *settings)
            except DemoError as error:
                return gr.HTML(views.problem(str(error))), gr.HTML("", visible=False)
            cards = [views.answer(*each) for each in zip(given.answers, given.routes, strict=True)]
            return gr.HTML(cards[0]), gr.HTML(cards[-1], visible=len(cards) > 1)

        self._when_opened(opened, [text, task, other, answer, other_answer, examples])
        gr.on(
            [button.click, text.submit],
            asked,
            [self.place, text, task, other, *self.settings],
            [answer, other_answer],
            api_visibility="private",
        )
        examples.click(lambda row: row, examples, [task, text], api_visibility="private")

    def _mixed_batch(self) -> None:
        gr.HTML(views.note(ABOUT_BATCH))
        lines = gr.Textbox(label="Texts", lines=7, info=PAIRS, elem_id="lines")
        with gr.Row():
            button = gr.Button("Ask all at once", variant="primary", scale=0, min_width=200)
        result = gr.HTML()

        def opened(found: Opened) -> tuple[Any, str]:
            examples = [f"{line.task}: {line.text}" for line in found.examples(self.options.examples)]
            hint = "\n".join(f"{name}: a text" for name in found.subspace.tasks[:3])
            return gr.Textbox("\n".join(examples), placeholder=hint), ""

        def asked(place: str, written: str, *settings: Any) -> str:
            def answered() -> str:
                found = self.desk.get(place)
                split = parsed(written, found.subspace)
                return views.batch(split, ask(found, split, *settings))

            return shown(answered)

        self._when_opened(opened, [lines, result])
        button.click(asked, [self.place, lines, *self.settings], result, api_visibility="private")

    def _when_opened(self, refresh: Callable[[Opened], Any], outputs: Any) -> None:
        """Refresh components when a subspace has been opened."""
        self.opening.then(
            lambda place: refresh(self.desk.get(place)) if place else gr.skip(),
            self.place,
            outputs,
            show_progress="hidden",
            api_visibility="private",
        )

    def _paged(self, show: Callable[..., tuple[str, int, int]], search: gr.Textbox | None = None) -> None:
        """Show a table of which a page at a time is sent to the browser.

        Args:
            show: Function that takes a subspace, the number of a page, and what is searched for if there is a search.
                It returns the page, its number, and the number of pages.
            search: What is searched for.
        """
        number, table = gr.State(1), gr.HTML()
        with gr.Row(visible=False) as buttons:
            back = gr.Button("‹ Back", min_width=90, scale=0)
            on = gr.Button("Next ›", min_width=90, scale=0)
            position = gr.HTML()
        outputs = [table, number, position, buttons]

        def turned(found: Opened, page: int, *typed: str) -> tuple[Any, ...]:
            shown_page, page, pages = show(found, page, *typed)
            return shown_page, page, views.note(f"Page {page} of {pages}"), gr.Row(visible=pages > 1)

        def turning(step: int | None) -> Callable[..., tuple[Any, ...]]:
            def turn(place: str, page: int, *typed: str) -> tuple[Any, ...]:
                return turned(self.desk.get(place), 1 if step is None else page + step, *typed)

            return turn

        typed = [search] if search is not None else []
        inputs = [self.place, number, *typed]
        for trigger, step in ((back.click, -1), (on.click, 1), *((each.change, None) for each in typed)):
            trigger(turning(step), inputs, outputs, show_progress="hidden", api_visibility="private")
        self._when_opened(
            lambda found: (*turned(found, 1, *([""] * len(typed))), *([""] * len(typed))), [*outputs, *typed]
        )


def ask(found: Opened, lines: list[Line], base_model: str, after_text: str, longest: int) -> Any:
    """Answer the lines with what the page has as settings."""
    after = {AUTOMATIC: None, NOTHING: ""}.get(after_text, (after_text or "").replace("\\n", "\n"))
    return found.answerer(base_model).answer(lines, after_text=after, max_new_tokens=int(longest))


def shown(work: Callable[[], str]) -> str:
    """Return what a function shows, or the problem that it met."""
    try:
        return work()
    except DemoError as error:
        return views.problem(str(error))


def main(argv: list[str] | None = None) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    page = Page(arguments(argv)).build()
    page.launch(theme=THEME, css=views.CSS, footer_links=["gradio"])


if __name__ == "__main__":
    main()
