"""The definitions of GEM, compared with numbers worked out by hand."""

from __future__ import annotations

import json
import math

import pytest

from share_hf.continual import ContinualMetrics
from share_hf.state import row_names
from share_hf.state.scores import scores_in


MATRIX = [[0.9, 0.2, None], [0.8, 0.7, 0.4], [0.85, 0.5, 0.6]]


def metrics() -> ContinualMetrics:
    return ContinualMetrics(tasks=["a", "b", "c"], matrix=[list(row) for row in MATRIX], baseline=[0.3, 0.1, 0.2])


def test_average_is_the_mean_of_the_last_row() -> None:
    assert metrics().average == pytest.approx((0.85 + 0.5 + 0.6) / 3)


def test_backward_transfer_compares_the_last_row_with_the_diagonal() -> None:
    assert metrics().backward_transfer == pytest.approx(((0.85 - 0.9) + (0.5 - 0.7)) / 2)


def test_scores_that_are_not_numbers_count_as_not_measured_when_they_are_read() -> None:
    content = metrics().as_dict()
    content["matrix"][1][0], content["baseline"][2] = math.nan, math.inf

    read = ContinualMetrics.from_dict(json.loads(json.dumps(content)))

    assert read.matrix[1] == [None, 0.7, 0.4]
    assert read.baseline == [0.3, 0.1, None]


def test_forgetting_compares_the_last_row_with_the_best_before_it() -> None:
    later_best = ContinualMetrics(tasks=["a", "b", "c"], matrix=[[0.5, None, None], [0.8, 0.7, None], [0.6, 0.7, 0.9]])
    assert later_best.forgetting == pytest.approx(((0.8 - 0.6) + 0.0) / 2)


def test_forward_transfer_compares_the_row_before_a_task_with_the_untrained_model() -> None:
    assert metrics().forward_transfer == pytest.approx(((0.2 - 0.1) + (0.4 - 0.2)) / 2)


def test_what_was_not_measured_is_left_out() -> None:
    unmeasured = ContinualMetrics(tasks=["a", "b"], matrix=[[0.9, None], [None, 0.7]], baseline=[None, None])
    assert unmeasured.average == pytest.approx(0.7)
    assert unmeasured.backward_transfer is None
    assert unmeasured.forward_transfer is None


def test_nothing_is_known_before_the_first_task() -> None:
    empty = ContinualMetrics()
    assert (empty.average, empty.forgetting, empty.backward_transfer, empty.forward_transfer) == (None,) * 4


def test_metrics_survive_json() -> None:
    original = metrics()
    assert ContinualMetrics.from_dict(json.loads(json.dumps(original.as_dict()))) == original


def test_the_table_has_a_row_for_each_task_and_the_summary() -> None:
    table = metrics().table()
    assert "(before)" in table
    assert "0.850" in table.splitlines()[-2]
    assert table.splitlines()[-1].startswith("accuracy: average 0.650, forgetting ")


def test_a_score_before_a_task_was_learned_is_no_score_to_forget() -> None:
    lucky = ContinualMetrics(tasks=["a", "b", "c"], matrix=[[0.9, 0.99, None], [0.9, 0.8, None], [0.9, 0.8, 0.5]])
    assert lucky.forgetting == 0


def test_gaps_are_left_out_of_each_mean_by_itself() -> None:
    gaps = ContinualMetrics(
        tasks=["a", "b", "c"],
        matrix=[[0.9, None, None], [None, 0.8, 0.2], [0.6, None, 0.5]],
        baseline=[None, 0.4, 0.1],
    )
    assert gaps.average == pytest.approx((0.6 + 0.5) / 2)
    assert gaps.backward_transfer == pytest.approx(0.6 - 0.9)
    assert gaps.forgetting == pytest.approx(0.9 - 0.6)
    assert gaps.forward_transfer == pytest.approx(0.2 - 0.1)


def test_one_task_has_an_average_and_no_transfer() -> None:
    one = ContinualMetrics(tasks=["a"], matrix=[[0.75]], baseline=[0.5])
    assert one.average == 0.75
    assert (one.forgetting, one.backward_transfer, one.forward_transfer) == (None, None, None)


def test_a_stream_under_way_is_measured_by_the_tasks_it_has_learned() -> None:
    # The third task was evaluated before its turn, and is not learned yet.
    under_way = ContinualMetrics(
        tasks=["a", "b", "c"], matrix=[[0.9, 0.5, None], [0.8, 0.7, 0.1]], baseline=[0.3, 0.4, 0.1]
    )
    assert under_way.average == pytest.approx((0.8 + 0.7) / 2)
    assert under_way.backward_transfer == pytest.approx(0.8 - 0.9)
    assert under_way.forward_transfer == pytest.approx(0.5 - 0.4)


def test_the_table_has_a_dash_where_nothing_was_measured() -> None:
    lines = ContinualMetrics(tasks=["a", "b"], matrix=[[0.9, 0.5], [0.8, None]], baseline=[None, 0.45]).table()
    assert [line.split() for line in lines.splitlines()[:4]] == [
        ["after", "a", "b"],
        ["(before)", "-", "0.450"],
        ["a", "0.900", "0.500"],
        ["b", "0.800", "-"],
    ]


def test_the_table_shows_a_negative_number_that_rounds_to_zero_without_a_sign() -> None:
    table = ContinualMetrics(tasks=["a", "b"], matrix=[[0.8, None], [0.7997, 0.5]], baseline=[None, None]).table()
    assert "backward transfer 0.000" in table


def test_a_drift_that_is_text_is_refused() -> None:
    metrics = {**ContinualMetrics(tasks=["a"], matrix=[[0.5]]).as_dict(), "drift": {"a": "nan"}}
    with pytest.raises(ValueError, match="drift of 'a' is 'nan', expected a number"):
        ContinualMetrics.from_dict(metrics)


def together() -> ContinualMetrics:
    """Task a, then b, c and d in one row, then e."""
    matrix = [[0.9, 0.2, 0.3, 0.1, None], [0.8, 0.7, 0.6, 0.5, 0.4], [0.7, 0.6, 0.65, 0.5, 0.9]]
    return ContinualMetrics(
        tasks=list("abcde"), matrix=matrix, row_sizes=[1, 3, 1], baseline=[0.1, 0.1, 0.2, 0.0, 0.3]
    )


def test_tasks_that_were_learned_together_share_a_row() -> None:
    shared = together()
    assert shared.learned == 5
    assert shared.average == pytest.approx((0.7 + 0.6 + 0.65 + 0.5 + 0.9) / 5)
    assert shared.backward_transfer == pytest.approx((-0.2 - 0.1 + 0.05 + 0.0) / 4)
    assert shared.forgetting == pytest.approx((0.2 + 0.1 - 0.05 + 0.0) / 4)
    assert shared.forward_transfer == pytest.approx(((0.2 - 0.1) + (0.3 - 0.2) + 0.1 + (0.4 - 0.3)) / 4)
    scores = scores_in(shared.as_dict())
    assert {task: (score.learned, score.now) for task, score in scores.items()} == {
        "a": (0.9, 0.7),
        "b": (0.7, 0.6),
        "c": (0.6, 0.65),
        "d": (0.5, 0.5),
        "e": (0.9, 0.9),
    }
    assert row_names(shared.as_dict()) == ["a", "b +2", "e"]
    assert [line.split("  ")[0] for line in shared.table().splitlines()[1:5]] == ["(before)", "a", "b +2", "e"]


def test_tasks_that_were_learned_together_survive_json_and_a_join() -> None:
    shared = together()
    assert ContinualMetrics.from_dict(json.loads(json.dumps(shared.as_dict()))) == shared
    rest = shared.joined_by(shared, ["a", "c", "d", "e"])
    assert (rest.tasks, rest.row_sizes) == (list("acde"), [1, 2, 1])
    assert rest.matrix[1] == [0.8, 0.6, 0.5, 0.4]
    later = ContinualMetrics(tasks=["f"], matrix=[[0.5]])
    joined = shared.joined_by(later, "abcdef")
    assert (joined.tasks, joined.row_sizes) == (list("abcdef"), [1, 3, 1, 1])
    assert joined.matrix[3] == [None] * 5 + [0.5]


def test_rows_are_added_for_one_task_or_several() -> None:
    stream = ContinualMetrics()
    stream.add_tasks(["a"])
    stream.add_row([0.5], 1)
    assert stream.row_sizes == []
    stream.add_tasks(["b", "c"])
    stream.add_tasks(["b", "c", "d"])  # started again with one more
    stream.add_tasks(["b", "c", "d"])
    assert (stream.tasks, stream.matrix, len(stream.baseline)) == (list("abcd"), [[0.5, None, None, None]], 4)
    stream.add_row([0.5, 0.6, 0.7, 0.8], 3)
    assert (stream.row_sizes, stream.learned) == ([1, 3], 4)
    assert "row_sizes" in stream.as_dict()


@pytest.mark.parametrize("sizes", [[1, 1], [1, 4, 1], [1, 0, 1], "abc", [1, True, 1], [2, 3, 1.0]], ids=str)
def test_sizes_of_rows_that_no_stream_has_are_refused(sizes: object) -> None:
    content = {**together().as_dict(), "row_sizes": sizes}
    with pytest.raises(ValueError, match="row_sizes is"):
        ContinualMetrics.from_dict(content)


def test_scores_of_several_kinds_are_named_by_task() -> None:
    mixed = ContinualMetrics(tasks=["a", "b"], matrix=[[0.5, None], [0.5, 0.25]], baseline=[None, None])
    assert mixed.common_score == "accuracy"
    mixed.score_names["b"] = "pearson"
    content = json.loads(json.dumps(mixed.as_dict()))
    assert (content["score"], content["score_names"]) == ("score", {"a": "accuracy", "b": "pearson"})
    read = ContinualMetrics.from_dict(content)
    assert read.as_dict() == mixed.as_dict()
    assert [score.metric for score in scores_in(content).values()] == ["accuracy", "pearson"]
    assert read.table().splitlines()[1].split() == ["(score)", "accuracy", "pearson"]


def test_streams_of_different_scores_keep_the_names_of_both() -> None:
    earlier = ContinualMetrics(score="-loss", tasks=["a"], matrix=[[-0.5]])
    later = ContinualMetrics(tasks=["b"], matrix=[[0.75]])
    joined = earlier.joined_by(later, ["a", "b"])
    assert (joined.score_of("a"), joined.score_of("b")) == ("-loss", "accuracy")
    assert joined.joined_by(joined, ["b"]).as_dict()["score"] == "accuracy"


def test_names_of_scores_that_are_not_text_are_refused() -> None:
    content = {**metrics().as_dict(), "score_names": {"a": 1}}
    with pytest.raises(ValueError, match=r"score_names is \{'a': 1\}, expected the name of a metric for each task"):
        ContinualMetrics.from_dict(content)
