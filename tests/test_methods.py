"""Every published method, on every task it applies to, is the step written by hand in float64."""

import pytest
from method_cases import FAMILIES_OF, NORMS, check, example, tolerance, visible

from alum_kernels import AdversarialObjective
from alum_kernels.adversarial.config import PRESETS

CLASSIFIERS = ("bag", "bert", "gpt2", "bart")


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("family", CLASSIFIERS)
def test_a_method_is_the_one_written_by_hand(family, name):
    config = visible(name)
    if config.site == "embedding_norm_input" and family not in NORMS:
        with pytest.raises(ValueError, match="has no layer norm of its embeddings to perturb"):
            AdversarialObjective(example(family, "classification")[0], config, head="classification")
        return
    if config.ascent == "linearity" and family == "bag":
        with pytest.raises(ValueError, match=r"^loss: expected the model's own loss with ascent='linearity'"):
            check(family, "classification", config)
        return
    expected = check(family, "classification", config, rtol=tolerance(config))
    if config.alpha > 0 and name != "rdrop":
        assert expected.divergence > 1e-6


DISTINCT = [name for name in PRESETS if name != "alum_continual"]
"""Continual pre-training is pre-training under another name."""

EVERY = [
    # one family of each task tells whether a method and a task get on; the others repeat it
    pytest.param(
        name, task, family, marks=() if family == families[0] else pytest.mark.slow, id=f"{name}-{task}-{family}"
    )
    for task, families in FAMILIES_OF.items()
    for family in families
    for name in DISTINCT
    if task != "classification" and (name != "sift" or family in NORMS)
]


@pytest.mark.parametrize(("name", "task", "family"), EVERY)
def test_a_method_on_every_task_it_applies_to(name, task, family):
    config = visible(name)
    check(family, task, config, rtol=tolerance(config, family))
