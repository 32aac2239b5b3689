"""Flat names of metrics, and the table of an evaluation."""

import numpy as np

from zslflax.evaluation.results import Metric, flat_names, format_table, with_intervals


def test_flat_names_have_all_parts_of_a_metric_in_order():
    names = {
        Metric("hit", 1, test_set="test"): "eval/test/hit@1",
        Metric("hit", 1, model="student", test_set="test"): "eval/test/student/hit@1",
        Metric("hit", 1, "seen", "synonyms", "student", "test", "low"): "eval/test/student/synonyms/seen/hit@1/low",
        Metric("image_to_text", 5, task="retrieval", test_set="test"): "eval/test/retrieval/image_to_text@5",
        Metric("mAP", group="unseen"): "unseen/mAP",
        Metric("labelled"): "labelled",
    }
    assert list(flat_names(dict.fromkeys(names, 0.0))) == list(names.values())


def test_intervals_are_added_under_their_own_names():
    results = with_intervals({Metric("hit", 1): 0.5, Metric("mAP"): 0.2}, {Metric("hit", 1): np.arange(101.0)})
    assert flat_names(results) == {"hit@1": 0.5, "mAP": 0.2, "hit@1/low": 2.5, "hit@1/high": 97.5}


def test_the_table_has_a_row_per_test_set_model_and_measure():
    a, student = Metric("hit", 1, test_set="a"), Metric("hit", 1, model="student", test_set="a")
    results = {Metric("image_to_text", 5, task="retrieval", test_set="a"): 0.75}
    results |= {a: 0.5, a._replace(k=10): 1.0, Metric("mAP", test_set="a"): 0.25, student: 0.4}
    results |= {a._replace(bound="low"): 0.4, Metric("labelled", test_set="a"): 7, student._replace(group="seen"): 0.1}
    results |= {a._replace(group="harmonic"): 0.3, a._replace(group="unseen"): 0.2}
    *table, explained = format_table(results).splitlines()
    assert explained == "(student: the model itself; the other rows are of its moving average, which a run ships)"
    assert [line.split() for line in table] == [
        ["@1", "@5", "@10", "mAP"],
        ["a", "hit@k", "50.0", "100.0", "25.0"],
        ["a", "student", "hit@k", "40.0"],
        ["a", "unseen", "hit@k", "20.0"],
        ["a", "retrieval", "image_to_text@k", "75.0"],
    ]


def test_the_table_has_half_of_the_width_of_each_interval():
    hit = Metric("hit", 1, test_set="a")
    results = {
        hit: 0.5,
        hit._replace(bound="low"): 0.44,
        hit._replace(bound="high"): 0.56,
        Metric("mAP", test_set="a"): 1,
    }
    assert format_table(results).splitlines() == ["                @1        mAP", "a hit@k  50.0 ±6.0      100.0"]


def test_a_test_set_may_be_called_like_a_part_of_a_metric():
    results = {Metric("hit", 1, test_set="student"): 0.5, Metric("hit", 1, group="seen", test_set="student"): 0.4}
    lines = format_table(results).splitlines()
    assert [line.split() for line in lines[1:]] == [["student", "hit@k", "50.0"], ["student", "seen", "hit@k", "40.0"]]
