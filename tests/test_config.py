"""The configuration: what it refuses, how it travels, and the constants of the published settings."""

import json

import pytest

from alum_kernels import AdversarialConfig
from alum_kernels.adversarial.presets import FREELB_GLUE, PRESETS


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
        ("ascent", "loss", ValueError),
        ("update", "set", ValueError),
        ("backward", "first", ValueError),
        ("noise_level", "token", ValueError),
        ("units", "norm", ValueError),
        ("site", "logits", ValueError),
        ("side", "left", ValueError),
        ("proximal", -1.0, ValueError),
        ("proximal_momentum", 1.5, ValueError),
        ("proximal_momentum", "0.9", TypeError),
        ("proximal_interval", 0, ValueError),
        ("start", -1, ValueError),
        ("start", 1.5, ValueError),
        ("start", "0.5", TypeError),
        ("alpha_schedule", ((0.5, 1.0), (0.2, 1.0)), ValueError),
        ("alpha_schedule", ((2.0, 1.0),), ValueError),
        ("epsilon_schedule", ((0.0, -1.0),), ValueError),
        ("epsilon_schedule", (0.0, 1.0), TypeError),
        ("detach_embeddings", 1, TypeError),
        ("excluded_tokens", ("[CLS]",), TypeError),
        ("excluded_tokens", 3, TypeError),
        ("modules", (3,), TypeError),
        ("adversarial_fraction", 0.0, ValueError),
        ("adversarial_fraction", 1.5, ValueError),
        ("adversarial_fraction", "half", TypeError),
        ("adversarial_interval", 0, ValueError),
        ("delta_lifetime", 0, ValueError),
        ("ascent_depth", -1, ValueError),
        ("ascent_depth", 1.0, TypeError),
        ("ascent_dtype", "float64", ValueError),
        ("labelled_capacity", 0.0, ValueError),
        ("labelled_capacity", 2.0, ValueError),
        ("memory", "none", ValueError),
    ],
)
def test_a_bad_value_is_refused_by_name(field, value, error):
    with pytest.raises(error, match=f"^{field}: expected"):
        AdversarialConfig(**{field: value})
    with pytest.raises(error, match=f"^{field}: expected"):
        AdversarialConfig().replace(**{field: value})


def test_an_unknown_field_is_named_with_the_known_ones():
    for make in (AdversarialConfig.from_dict, lambda fields: AdversarialConfig().replace(**fields)):
        with pytest.raises(ValueError, match="unknown fields eta, sigma; known are clean_weight, adversarial_weight"):
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
    changes = {"seed": 3, "backend": "reference", "temperature": 2, "epsilon_schedule": [[0, 0.5], [1, 1]]}
    changes["proximal_momentum"] = [[0.1, 0.99], [0.1, 0.999]]
    config = getattr(AdversarialConfig, preset)(**changes, excluded_tokens=[1, 2])
    config = config if config.site != "embeddings" else config.replace(modules=("a.b", "c"))
    assert hash(config) == hash(config.replace())
    assert AdversarialConfig.from_dict(config.to_dict()) == config
    assert AdversarialConfig.from_json(config.to_json()) == config
    assert json.loads(config.to_json()) == config.to_dict()
    assert config.method == preset


@pytest.mark.parametrize("text", ["[]", "3", '"alum"'])
def test_json_that_is_no_object_is_refused(text):
    with pytest.raises(ValueError, match="expected a JSON object"):
        AdversarialConfig.from_json(text)


DIVERGENCE = {"alpha": 1.0, "clean_weight": 1.0, "adversarial_weight": 0.0, "ascent": "divergence", "backward": "final"}
ALUM = {**DIVERGENCE, "std": 1e-5, "epsilon": 1e-5, "step_size": 1e-3, "steps": 1, "distribution": "normal"}
TASK = {"alpha": 0.0, "clean_weight": 0.0, "adversarial_weight": 1.0, "norm": "l2", "level": "sequence"}
RTE = {**TASK, "steps": 3, "step_size": 6e-2, "std": 1.6e-1, "epsilon": 1.4e-1, "normalize": "l2", "ascent": "task"}
GROUP = {"noise_level": "group", "distribution": "uniform"}
PUBLISHED = {
    "alum_pretraining": {**ALUM, "alpha": 10.0, "normalize": "none", "norm": "linf", "level": "token"},
    "alum_continual": {**ALUM, "alpha": 10.0, "normalize": "none", "norm": "linf", "start": 0},
    "alum_finetuning": {**ALUM, "normalize": "none", "norm": "linf", "level": "token"},
    "smart": {**ALUM, "normalize": "linf", "level": "sequence", "norm": "linf", "proximal": 0.0},
    "mtdnn": {
        **ALUM,
        "normalize": "none",
        "norm": "linf_rescale",
        "ascent_divergence": "kl",
        "gradient": "detach_targets",
        "dropout": "independent",
    },
    "freelb": {**RTE, **GROUP, "backward": "accumulate", "dropout": "shared", "inner_steps": 0},
    "pgd": {**RTE, **GROUP, "backward": "final"},
    "fgm": {
        **TASK,
        "adversarial_weight": 2.0,
        "steps": 1,
        "std": 0.0,
        "step_size": 5.0,
        "epsilon": 5.0,
        "normalize": "l2",
        "backward": "accumulate",
    },
    "freeat": {**RTE, **GROUP, "backward": "replay", "dropout": "independent"},
    "yopo": {**RTE, **GROUP, "backward": "accumulate", "inner_steps": 3, "first_layer": None},
    "llr": {
        "alpha": 0.0,
        "clean_weight": 1.0,
        "linearity": 4.0,
        "linearity_gradient": 3.0,
        "ascent": "linearity",
        "steps": 2,
        "std": 0.1,
        "distribution": "uniform",
        "step_size": 0.05,
        "epsilon": 0.1,
        "norm": "linf",
        "normalize": "sign",
        "level": "sequence",
        "units": "rms",
    },
    "vat": {
        **DIVERGENCE,
        "std": 0.1,
        "noise_level": "group",
        "distribution": "normal",
        "update": "replace",
        "step_size": 5.0,
        "epsilon": 5.0,
        "steps": 1,
        "norm": "l2",
        "level": "sequence",
        "divergence": "kl",
        "ascent_divergence": "kl",
        "gradient": "detach_clean",
    },
    "sift": {
        **DIVERGENCE,
        "alpha": 5.0,
        "std": 1e-2,
        "step_size": 1e-4,
        "norm": "none",
        "normalize": "linf",
        "level": "token",
        "units": "std",
        "site": "embedding_norm_input",
        "detach_embeddings": True,
        "gradient": "detach_targets",
        "dropout": "independent",
    },
    "r3f": {**ALUM, "steps": 0, "norm": "none", "step_size": 0.0},
    "rdrop": {**DIVERGENCE, "alpha": 0.5, "adversarial_weight": 1.0, "std": 0.0, "steps": 0, "dropout": "independent"},
    "neftune": {**TASK, **GROUP, "std": 5.0, "steps": 0, "norm": "none"},
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_hold_the_published_constants(preset):
    fields = getattr(AdversarialConfig, preset)().to_dict()
    for name, value in {"temperature": 1.0, "method": preset, **PUBLISHED[preset]}.items():
        assert fields[name] == value, name


def test_every_preset_is_checked():
    assert set(PUBLISHED) == set(PRESETS)


@pytest.mark.parametrize("task", FREELB_GLUE)
def test_freelb_takes_the_constants_of_a_task(task):
    setting = FREELB_GLUE[task]
    for config in (AdversarialConfig.freelb(task), AdversarialConfig.pgd(task, alpha=0.0)):
        assert (config.steps, config.step_size, config.std, config.epsilon) == tuple(setting)
    with pytest.raises(ValueError, match=r"task: expected one of 'cola', .*, got 'wnli'"):
        AdversarialConfig.freelb("wnli")


def test_smart_has_both_balls():
    config = AdversarialConfig.smart(norm="l2", alpha=3.0)
    assert (config.norm, config.normalize, config.level, config.alpha) == ("l2", "l2", "sequence", 3.0)
    with pytest.raises(ValueError, match="norm: expected one of 'linf', 'l2', got 'none'"):
        AdversarialConfig.smart(norm="none")


ON_THE_WAY = {"alpha": 0, "clean_weight": 0, "adversarial_weight": 1, "ascent": "task", "normalize": "l2"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alpha": 0, "clean_weight": 0}, "alpha, clean_weight, adversarial_weight: expected one of them > 0"),
        ({"backward": "accumulate"}, "backward: 'accumulate' trains on the task's loss"),
        ({**ON_THE_WAY, "backward": "replay", "clean_weight": 1}, "backward: 'replay' trains on the task's loss"),
        ({**ON_THE_WAY, "backward": "accumulate", "normalize": "none"}, "normalize: expected 'linf', 'l2' or 'sign'"),
        ({**ON_THE_WAY, "inner_steps": 2}, "inner_steps: expected 0 unless backward is 'accumulate'"),
        ({"first_layer": "encoder"}, "first_layer: expected None without inner_steps"),
        ({**ON_THE_WAY, "signal_check_interval": 3}, "signal_check_interval: expected 0 where alpha is 0"),
        ({"dropout": "independent", "signal_check_interval": 3}, "signal_check_interval: expected 0 with dropout"),
        ({"modules": ("a",), "site": "embedding_norm"}, r"modules: expected \(\) with a site"),
        ({**ON_THE_WAY, "alpha_schedule": ((0.0, 1.0),)}, r"alpha_schedule: expected \(\) where alpha"),
        ({"modules": ("a",), "side": "both"}, r"modules: expected \(\) with a site"),
        ({**ON_THE_WAY, "adversarial_fraction": 0.5}, "adversarial_fraction: expected its default unless"),
        ({"alpha": 0, "ascent_depth": 1}, "ascent_depth: expected its default unless"),
        ({"adversarial_weight": 1.0, "memory": "low"}, "memory: expected its default unless"),
        ({"ascent": "task", "delta_lifetime": 2}, "delta_lifetime: expected its default unless"),
        ({"clean_weight": 0, "adversarial_interval": 2}, "adversarial_interval: expected 1 with clean_weight 0"),
        ({"ascent_depth": 1, "modules": ("a",)}, "ascent_depth: expected 0 with modules"),
        ({"ascent_depth": 1, "side": "both"}, "ascent_depth: expected 0 with modules"),
        ({"ascent_depth": 1, "memory": "low"}, "ascent_depth: expected 0 with memory='low'"),
        ({"delta_lifetime": 2, "adversarial_fraction": 0.5}, "delta_lifetime: expected 1 with adversarial_fraction"),
        ({"delta_lifetime": 2, "steps": 0}, "delta_lifetime: expected 1 with adversarial_fraction"),
        ({"proximal": 1.0, "memory": "low"}, "proximal: expected 0 with adversarial_fraction < 1 or memory='low'"),
        ({"ascent_dtype": "bfloat16", "steps": 0}, "ascent_dtype: expected None unless the divergence is climbed"),
    ],
)
def test_what_no_step_could_do_is_refused(fields, message):
    with pytest.raises(ValueError, match="^" + message):
        AdversarialConfig(**fields)
