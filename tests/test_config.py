"""The configuration: what it refuses, how it travels, and the constants of the published settings."""

import json

import pytest

from alum_kernels import AdversarialConfig
from alum_kernels.adversarial.config import PRESETS


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("alpha", -1.0, ValueError),
        ("alpha", float("nan"), ValueError),
        ("alpha", "1", TypeError),
        ("alpha", True, TypeError),
        ("std", -1e-5, ValueError),
        ("step_size", float("inf"), ValueError),
        ("epsilon", -1, ValueError),
        ("temperature", 0, ValueError),
        ("temperature", -2.0, ValueError),
        ("steps", -1, ValueError),
        ("steps", 1.0, TypeError),
        ("steps", True, TypeError),
        ("seed", "0", TypeError),
        ("signal_check_interval", -5, ValueError),
        ("distribution", "gaussian", ValueError),
        ("norm", "l1", ValueError),
        ("normalize", "max", ValueError),
        ("level", "word", ValueError),
        ("divergence", "mse", ValueError),
        ("ascent_divergence", "mse", ValueError),
        ("gradient", "half", ValueError),
        ("dropout", "same", ValueError),
        ("backend", "cuda", ValueError),
        ("modules", "bert.embeddings", TypeError),
    ],
)
def test_a_bad_value_is_refused_by_name(field, value, error):
    with pytest.raises(error, match=f"^{field}: expected"):
        AdversarialConfig(**{field: value})
    with pytest.raises(error, match=f"^{field}: expected"):
        AdversarialConfig().replace(**{field: value})


def test_an_unknown_field_is_named_with_the_known_ones():
    for make in (AdversarialConfig.from_dict, lambda fields: AdversarialConfig().replace(**fields)):
        with pytest.raises(ValueError, match="unknown fields eta, sigma; known are method, alpha"):
            make({"sigma": 1.0, "eta": 2.0, "alpha": 1.0})


def test_it_is_frozen_and_replace_leaves_the_original():
    config = AdversarialConfig(alpha=2.0)
    with pytest.raises(AttributeError):
        config.alpha = 3.0
    assert config.replace(alpha=3).alpha == 3
    assert config.alpha == 2.0
    assert hash(config) == hash(AdversarialConfig(alpha=2.0))


@pytest.mark.parametrize("preset", PRESETS)
def test_round_trips_give_the_same_config(preset):
    config = getattr(AdversarialConfig, preset)(modules=("a.b", "c"), seed=3, backend="reference", temperature=2)
    assert AdversarialConfig.from_dict(config.to_dict()) == config
    assert AdversarialConfig.from_json(config.to_json()) == config
    assert json.loads(config.to_json()) == config.to_dict()
    assert config.method == preset


@pytest.mark.parametrize("text", ["[]", "3", '"alum"'])
def test_json_that_is_no_object_is_refused(text):
    with pytest.raises(ValueError, match="expected a JSON object"):
        AdversarialConfig.from_json(text)


PUBLISHED = {
    "alum_pretraining": {"alpha": 10.0, "normalize": "none", "norm": "linf"},
    "alum_finetuning": {"alpha": 1.0, "normalize": "none", "norm": "linf"},
    "smart": {"alpha": 1.0, "normalize": "linf", "level": "sequence", "norm": "linf"},
    "mtdnn": {
        "alpha": 1.0,
        "normalize": "none",
        "norm": "linf_rescale",
        "ascent_divergence": "kl",
        "gradient": "detach_targets",
        "dropout": "independent",
    },
    "r3f": {"alpha": 1.0, "steps": 0, "norm": "none", "step_size": 0.0},
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_hold_the_published_constants(preset):
    shared = {"std": 1e-5, "epsilon": 1e-5, "step_size": 1e-3, "steps": 1, "distribution": "normal", "temperature": 1.0}
    fields = getattr(AdversarialConfig, preset)().to_dict()
    for name, value in {**shared, **PUBLISHED[preset]}.items():
        assert fields[name] == value, name
