"""The course of the learning rate: a function of the step, so that nothing of it has to be saved."""


def linear_share(step: int, total: int, warm_up: int) -> float:
    """Share of the peak at a step: a straight line up over ``warm_up`` steps, then one down to the end.

    Args:
        step: optimizer steps made so far.
        total: of the whole training.
        warm_up: steps of the rise, at least 1.

    Example:
        >>> [linear_share(step, 6, 2) for step in range(6)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    return min((step + 1) / warm_up, (total - step) / max(1, total - warm_up))
