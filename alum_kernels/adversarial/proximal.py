"""Bregman proximal point updates: the model may not move far, in what it predicts, from a teacher that follows it.

    loss += mu D(f(x; model), f(x; teacher))
    teacher <- beta teacher + (1 - beta) model        every S optimizer steps

beta = 0 is the proximal point method (the teacher is the model as it was), beta > 0 its momentum-accelerated form.
With beta = 0 and S = 1 the teacher equals the model at every step, and the term has no gradient but under dropout that
differs between their passes.

Source: Jiang et al., arXiv:1911.03437, section 3.2.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from alum_kernels.adversarial.config import AdversarialConfig
from alum_kernels.adversarial.model_state import unwrap
from alum_kernels.adversarial.schedule import Progress


class BregmanProximal:
    """The teacher of one model: a second set of its trained parameters.

    Kept in fp32 (fp64 for fp64 parameters): in bf16 an average with beta = 0.999 would stand still.

    Args:
        model: the model; what it is when the teacher is made is the first teacher.
        interval: optimizer steps S between two updates.
        momentum: beta of the moment.
    """

    def __init__(self, model: nn.Module, interval: int, momentum: Callable[[], float]) -> None:
        self._model, self._interval, self._momentum = model, interval, momentum
        self._steps = 0
        self._teacher: dict[str, Tensor] = {}
        self._take_up()

    def _take_up(self) -> None:
        """Parameters that are trained from here on begin as they are now."""
        for name, parameter in unwrap(self._model).named_parameters():
            if parameter.requires_grad and name not in self._teacher:
                wide = torch.promote_types(parameter.dtype, torch.float32)
                self._teacher[name] = parameter.detach().to(wide, copy=True)

    def forward(self, inputs: Mapping[str, Any]) -> Any:
        """What the model returns with the teacher's parameters."""
        self._take_up()
        inner = unwrap(self._model)
        own = dict(inner.named_parameters())
        weights = {name: weight.to(own[name]) for name, weight in self._teacher.items()}
        return torch.func.functional_call(inner, weights, (), dict(inputs))

    @torch.no_grad()
    def step(self) -> None:
        """An optimizer step was made; every S of them the teacher follows."""
        self._steps += 1
        if self._steps % self._interval:
            return
        beta = self._momentum()
        own = dict(unwrap(self._model).named_parameters())
        for name, weight in self._teacher.items():
            weight.lerp_(own[name].to(weight), 1 - beta)

    def state_dict(self) -> dict[str, Any]:
        """The teacher, for a checkpoint."""
        return {"steps": self._steps, "teacher": {name: weight.clone() for name, weight in self._teacher.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a checkpoint's teacher.

        Raises:
            ValueError: it has other parameters than this model.
        """
        given: Mapping[str, Tensor] = state["teacher"]
        if set(given) != set(self._teacher):
            differing = sorted(set(given) ^ set(self._teacher))
            raise ValueError(
                f"teacher: expected the trained parameters of the model, got others: {', '.join(differing)}"
            )
        for name, weight in self._teacher.items():
            weight.copy_(given[name])
        self._steps = state["steps"]


class Teaching:
    """The teacher of a config with a proximal term, from when it follows an optimizer.

    Args:
        model: the model.
        config: ``proximal``, ``proximal_interval`` and the momentum's schedule.
        progress: how far the training is.
    """

    def __init__(self, model: nn.Module, config: AdversarialConfig, progress: Callable[[], Progress]) -> None:
        self._model, self._config, self._progress = model, config, progress
        self._teacher: BregmanProximal | None = None
        self._state: Mapping[str, Any] | None = None
        self._following: RemovableHandle | None = None

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """The teacher begins as the model is now, and is updated after steps of this optimizer.

        It begins as a checkpoint's, where one was loaded and no step was made since.

        Raises:
            ValueError: the config has no proximal term, or a checkpoint's teacher has other parameters.
        """
        if self._config.proximal == 0:
            raise ValueError("proximal: expected a weight > 0 where a teacher is to follow, got 0")
        teacher = BregmanProximal(self._model, self._config.proximal_interval, self._momentum)
        if self._state is not None:
            teacher.load_state_dict(self._state)
            self._state = None
        self.stop()
        self._teacher = teacher
        self._following = optimizer.register_step_post_hook(self._follow_step)

    def stop(self) -> None:
        """Follow no optimizer any more."""
        if self._following is not None:
            self._following.remove()
            self._following = None

    def teacher(self) -> BregmanProximal | None:
        """The teacher, None without a proximal term.

        Raises:
            ValueError: it follows no optimizer.
        """
        if self._config.proximal == 0:
            return None
        if self._teacher is None:
            raise ValueError(
                "proximal: expected an optimizer that the teacher follows; call AdversarialObjective.follow(optimizer)"
            )
        return self._teacher

    def state_dict(self) -> Mapping[str, Any] | None:
        """Of the teacher, None where there is none."""
        return self._state if self._teacher is None else self._teacher.state_dict()

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Take up a checkpoint's teacher, now, and again if another optimizer is followed before the next step."""
        self._state = state
        if self._teacher is not None and state is not None:
            self._teacher.load_state_dict(state)

    def _follow_step(self, *_: Any) -> None:
        self._state = None  # what was taken up is behind
        self._teacher.step()

    def _momentum(self) -> float:
        momentum = self._config.proximal_momentum
        if isinstance(momentum, int | float):
            return momentum
        return self._progress().value("proximal_momentum", momentum, default=0.0)
