"""Combinations of an adversarial config's fields that no step could do."""

from typing import Any


def check_combination(config: Any) -> None:
    """Raises ValueError, naming the fields, for what no step could do; ``config`` is an ``AdversarialConfig``."""
    linearises = config.linearity > 0 or config.linearity_gradient > 0
    if not (config.alpha or config.clean_weight or config.adversarial_weight or linearises):
        raise ValueError("alpha, clean_weight, adversarial_weight: expected one of them > 0, nothing would be trained")
    if config.backward != "final":
        if config.alpha or config.clean_weight or config.proximal or config.ascent != "task":
            raise ValueError(
                f"backward: {config.backward!r} trains on the task's loss at the perturbed point alone, so expected "
                "alpha, clean_weight and proximal 0 and ascent 'task'"
            )
        if config.normalize == "none":
            raise ValueError(
                f"normalize: expected 'linf', 'l2' or 'sign' with backward={config.backward!r}, whose gradients "
                "carry the trainer's loss scale"
            )
    if config.backward == "replay" and config.adversarial_weight == 0:
        raise ValueError("adversarial_weight: expected a number > 0 with backward='replay', got 0")
    if config.first_layer is not None and config.inner_steps == 0:
        raise ValueError(f"first_layer: expected None without inner_steps, got {config.first_layer!r}")
    if config.inner_steps and config.backward != "accumulate":
        raise ValueError(f"inner_steps: expected 0 unless backward is 'accumulate', got {config.inner_steps}")
    if linearises != config.climbs_linearity:
        raise ValueError(
            "linearity, linearity_gradient: expected one of them > 0 with ascent='linearity' and both 0 without, "
            f"got {config.linearity}, {config.linearity_gradient} and ascent={config.ascent!r}"
        )
    if config.climbs_linearity and (config.alpha or config.adversarial_weight):
        raise ValueError(
            "alpha, adversarial_weight: expected 0 with ascent='linearity', whose perturbation belongs to the "
            f"linearity terms alone, got {config.alpha} and {config.adversarial_weight}"
        )
    if config.climbs_linearity and config.steps and config.std == 0:
        raise ValueError(
            "std: expected a number > 0 with ascent='linearity', got 0: the loss is linear at no distance, and "
            "nothing could be climbed"
        )
    if config.signal_check_interval and not (config.alpha or linearises):
        raise ValueError(
            "signal_check_interval: expected 0 where alpha is 0 and ascent not 'linearity': none is checked"
        )
    if config.signal_check_interval and config.dropout == "independent":
        raise ValueError(
            "signal_check_interval: expected 0 with dropout='independent', whose masks differ between J(delta) and "
            "J(delta / 2)"
        )
    if config.alpha_schedule and not (config.alpha or linearises):
        raise ValueError("alpha_schedule: expected () where alpha and the weights of linearity are 0")
    if config.modules and (config.site != "embeddings" or config.side != "encoder"):
        raise ValueError("modules: expected () with a site or a side other than the default, which name modules too")
    _check_savings(config)


def _check_savings(config: Any) -> None:
    """What saves time or memory, and what it cannot be combined with."""
    compares_at_the_end = (
        config.backward == "final"
        and config.alpha > 0
        and config.adversarial_weight == 0
        and (config.steps == 0 or config.ascent == "divergence")
    )
    savings = {
        "adversarial_fraction": config.adversarial_fraction < 1,
        "ascent_depth": config.ascent_depth > 0,
        "delta_lifetime": config.delta_lifetime > 1,
        "memory": config.memory == "low",
    }
    for name in (name for name, used in savings.items() if used):
        if not compares_at_the_end:
            raise ValueError(
                f"{name}: expected its default unless the method's one adversarial term is alpha > 0, climbed by "
                f"divergence, got {getattr(config, name)!r}"
            )
    if config.adversarial_interval > 1 and config.clean_weight == 0:
        raise ValueError(
            "adversarial_interval: expected 1 with clean_weight 0, where the steps between would train on nothing, "
            f"got {config.adversarial_interval}"
        )
    if config.ascent_depth and (config.modules or config.site != "embeddings" or config.side == "both"):
        raise ValueError(
            "ascent_depth: expected 0 with modules, a site other than the embeddings or both sides, since it is a "
            f"place to perturb itself, got {config.ascent_depth}"
        )
    if config.memory == "low" and config.dropout == "independent":
        raise ValueError(
            "memory: expected 'high' with dropout='independent': the clean pass runs twice, and must be the same twice"
        )
    if config.ascent_depth and config.memory == "low":
        raise ValueError("ascent_depth: expected 0 with memory='low', which keeps no clean graph to go on from")
    if config.delta_lifetime > 1 and (config.adversarial_fraction < 1 or config.steps == 0):
        raise ValueError(
            "delta_lifetime: expected 1 with adversarial_fraction < 1 or without ascent steps, "
            f"got {config.delta_lifetime}"
        )
    if config.proximal > 0 and (config.adversarial_fraction < 1 or config.memory == "low"):
        raise ValueError("proximal: expected 0 with adversarial_fraction < 1 or memory='low', which it is not part of")
    if config.ascent_dtype is not None and not (config.steps and config.ascent == "divergence"):
        raise ValueError(f"ascent_dtype: expected None unless the divergence is climbed, got {config.ascent_dtype!r}")
