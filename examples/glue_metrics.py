"""What the predictions of a task are judged by, all from libraries that others check too.

    matthews           Matthews correlation of two classes                       scikit-learn
    accuracy, f1       share that is right; F1 of class 1                        scikit-learn
    pearson, spearman  correlation of scores, and of their ranks                 scipy
    entity_f1 ...      of whole entities: right type, first and last word        seqeval

A correlation with predictions that are all equal is undefined; it is given as 0, as scikit-learn gives Matthews'.
"""

from collections.abc import Callable, Sequence

Score = Callable[[Sequence, Sequence], float]


def matthews(predicted: Sequence[int], expected: Sequence[int]) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(expected, predicted))


def accuracy(predicted: Sequence[int], expected: Sequence[int]) -> float:
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(expected, predicted))


def f1(predicted: Sequence[int], expected: Sequence[int]) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(expected, predicted, pos_label=1, zero_division=0.0))


def pearson(predicted: Sequence[float], expected: Sequence[float]) -> float:
    from scipy.stats import pearsonr

    return _correlation(pearsonr, predicted, expected)


def spearman(predicted: Sequence[float], expected: Sequence[float]) -> float:
    from scipy.stats import spearmanr

    return _correlation(spearmanr, predicted, expected)


def _correlation(function: Callable, predicted: Sequence[float], expected: Sequence[float]) -> float:
    if len(set(predicted)) < 2 or len(set(expected)) < 2:
        return 0.0
    return float(function(predicted, expected).statistic)


def entity_f1(predicted: Sequence[Sequence[str]], expected: Sequence[Sequence[str]]) -> float:
    from seqeval.metrics import f1_score

    return float(f1_score(_lists(expected), _lists(predicted), zero_division=0))


def entity_precision(predicted: Sequence[Sequence[str]], expected: Sequence[Sequence[str]]) -> float:
    from seqeval.metrics import precision_score

    return float(precision_score(_lists(expected), _lists(predicted), zero_division=0))


def entity_recall(predicted: Sequence[Sequence[str]], expected: Sequence[Sequence[str]]) -> float:
    from seqeval.metrics import recall_score

    return float(recall_score(_lists(expected), _lists(predicted), zero_division=0))


def _lists(sentences: Sequence[Sequence[str]]) -> list[list[str]]:
    return [list(tags) for tags in sentences]


METRICS: dict[str, Score] = {
    score.__name__: score
    for score in (matthews, accuracy, f1, pearson, spearman, entity_f1, entity_precision, entity_recall)
}
"""Each takes predictions and truth: class indices, scores, or the tags of each sentence."""

LABELS = {
    "matthews": "Matthews corr.",
    "accuracy": "accuracy",
    "f1": "F1",
    "pearson": "Pearson",
    "spearman": "Spearman",
    "entity_f1": "entity F1",
    "entity_precision": "entity precision",
    "entity_recall": "entity recall",
}
"""Of axes and columns."""
