"""The metrics of GLUE tasks and named entities against formulas by hand, and the quartiles of their tables."""

import math

import pytest

from alum_kernels.evaluation.quartiles import Quartiles
from examples import glue_metrics
from examples.glue_tasks import TASKS


def test_matthews_correlation_by_hand():
    expected, predicted = [1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0, 1]
    tp, fn, tn, fp = 3, 1, 2, 1
    by_hand = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert glue_metrics.matthews(predicted, expected) == pytest.approx(by_hand, abs=1e-12)
    assert glue_metrics.matthews([1] * 7, expected) == 0.0


def test_accuracy_and_f1_by_hand():
    expected, predicted = [1, 1, 1, 0, 0], [1, 0, 1, 1, 0]
    assert glue_metrics.accuracy(predicted, expected) == pytest.approx(3 / 5)
    assert glue_metrics.f1(predicted, expected) == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert glue_metrics.f1([0, 0], [0, 0]) == 0.0


def test_correlations_by_hand():
    expected, predicted = [0.0, 1.0, 2.0, 5.0], [0.5, 0.4, 2.0, 9.0]
    mean_e, mean_p = sum(expected) / 4, sum(predicted) / 4
    joint = sum((e - mean_e) * (p - mean_p) for e, p in zip(expected, predicted, strict=True))
    sizes = math.prod(
        math.sqrt(sum((value - mean) ** 2 for value in values))
        for values, mean in ((expected, mean_e), (predicted, mean_p))
    )
    assert glue_metrics.pearson(predicted, expected) == pytest.approx(joint / sizes, abs=1e-12)
    assert glue_metrics.spearman(predicted, expected) == pytest.approx(1 - 6 * (1 + 1) / (4 * 15), abs=1e-12)
    assert glue_metrics.pearson([1.0] * 4, expected) == glue_metrics.spearman([1.0] * 4, expected) == 0.0


def test_entities_count_whole():
    pytest.importorskip("seqeval", reason="seqeval is not installed: pip install 'alum-kernels[examples]'")
    expected = [["B-X", "I-X", "O", "B-X"], ["O", "B-Y", "O", "O"]]
    predicted = [["B-X", "O", "O", "B-X"], ["O", "B-Y", "B-Y", "O"]]
    precision, recall = 2 / 4, 2 / 3  # the first entity ends too early, the last one is not there
    assert glue_metrics.entity_precision(predicted, expected) == pytest.approx(precision)
    assert glue_metrics.entity_recall(predicted, expected) == pytest.approx(recall)
    assert glue_metrics.entity_f1(predicted, expected) == pytest.approx(2 * precision * recall / (precision + recall))
    assert glue_metrics.entity_f1([["O", "O"]], [["B-X", "O"]]) == 0.0
    assert glue_metrics.entity_f1([["B-X", "B-X"]], [["B-X", "I-X"]]) == 0.0
    assert glue_metrics.entity_f1([["B-Y", "O"]], [["B-X", "O"]]) == 0.0


def test_every_task_has_its_metrics():
    assert {name: task.metrics[0] for name, task in TASKS.items()} == {
        "cola": "matthews", "rte": "accuracy", "mrpc": "f1", "stsb": "pearson", "sst2": "accuracy", "ner": "entity_f1",
    }  # fmt: skip
    assert "accuracy" in TASKS["mrpc"].metrics
    assert "spearman" in TASKS["stsb"].metrics
    assert all(set(task.metrics) <= set(glue_metrics.METRICS) & set(glue_metrics.LABELS) for task in TASKS.values())


def test_quartiles_by_hand():
    assert Quartiles.of([4.0, 1.0, 2.0, 3.0]) == Quartiles(1.75, 2.5, 3.25)
    assert Quartiles.of([7.0]) == Quartiles(7.0, 7.0, 7.0)
    assert f"{Quartiles(0.25, 0.5, 0.75):.2f}" == "0.50 [0.25, 0.75]"
    with pytest.raises(ValueError, match="at least one"):
        Quartiles.of([])
