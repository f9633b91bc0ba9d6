"""FreeLB's constants of each GLUE task, which the methods compared with it take as well."""

from typing import Any, NamedTuple

from alum_kernels.ops.checks import check_choice


class FreeLBSetting(NamedTuple):
    """Constants of one GLUE task (l2).

    Attributes:
        steps: of the ascent.
        step_size: the paper's alpha.
        noise: length of the first perturbation.
        epsilon: radius of the ball.
    """

    steps: int
    step_size: float
    noise: float
    epsilon: float


FREELB_GLUE = {
    "cola": FreeLBSetting(3, 2.5e-2, 4e-1, 3e-1),
    "mnli": FreeLBSetting(2, 1e-1, 1e-1, 3e-1),
    "mrpc": FreeLBSetting(3, 4e-2, 6.4e-1, 4e-1),
    "qnli": FreeLBSetting(2, 1e-1, 2e-1, 2e-1),
    "qqp": FreeLBSetting(2, 1.5e-1, 3.2e-1, 6.2e-1),
    "rte": FreeLBSetting(3, 6e-2, 1.6e-1, 1.4e-1),
    "sst-2": FreeLBSetting(2, 1e-1, 1.0, 6e-1),
    "sts-b": FreeLBSetting(3, 1e-1, 1.6e-1, 2.8e-1),
}
"""FreeLB's constants for RoBERTa-large: the settings that the authors' launch scripts run
(https://github.com/zhuchen03/FreeLB, fairseq-RoBERTa/launch/FreeLB; QNLI and QQP those of the fp16 scripts, RTE the
released setting, which the script has commented out). A step count there is one of ascents; the paper's K counts the
passes, one more."""


def freelb_ball(task: str) -> dict[str, Any]:
    """The ascent of a task as fields of a config: an l2 ball a sequence, and a start of uniform noise.

    Args:
        task: a key of ``FREELB_GLUE``.

    Raises:
        ValueError: another task.
    """
    check_choice("task", task, tuple(FREELB_GLUE))
    setting = FREELB_GLUE[task]
    return {
        "steps": setting.steps,
        "std": setting.noise,
        "distribution": "uniform",
        "noise_level": "group",
        "step_size": setting.step_size,
        "epsilon": setting.epsilon,
        "norm": "l2",
        "normalize": "l2",
        "level": "sequence",
    }
