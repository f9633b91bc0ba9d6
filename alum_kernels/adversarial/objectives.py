"""One adversarial training step around an unchanged model.

    clean pass        the task's loss and logits; each perturbed module's output e is kept
    ascent, K times   x = e + delta as a leaf; g = d divergence / d x alone, no parameter gradient
    final pass        e + Pi(delta + step normalise(g)) inside the model, so that e's gradient reaches the embeddings
    loss              task loss + alpha divergence(final prediction, clean prediction)

A language model's predictions are compared without its logits where its head allows it (``linear_head.py``).

Clean and adversarial branches meet in one loss and one backward. With K = 1, delta_0 is never stored: the ascent draws
it again from the seed.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from alum_kernels.adversarial.config import AdversarialConfig
from alum_kernels.adversarial.heads import Head, detect_head
from alum_kernels.adversarial.hooks import (
    PerturbationHooks,
    RandomState,
    device_of,
    dropout_off,
    perturbed_modules,
    unwrap,
)
from alum_kernels.adversarial.linear_head import LinearHead, find_linear_head
from alum_kernels.adversarial.passes import (
    LinearPasses,
    LogitPasses,
    Passes,
    loss_of,
    one_sample,
    refusal,
    without_labels,
)
from alum_kernels.adversarial.perturbation import DeviceConstants, Perturbation
from alum_kernels.adversarial.predictions import (
    Prediction,
    divergence_sum,
    mean_divergences,
    sum_and_gradients,
)
from alum_kernels.adversarial.telemetry import Telemetry
from alum_kernels.ops.linear_arguments import LINEAR_DIVERGENCES

LossFunction = Callable[[Any, Mapping[str, Any]], Tensor]
CleanPass = Callable[[], tuple[Tensor, Any]]


@dataclass(frozen=True)
class AdversarialOutput:
    """What a step's passes gave.

    Attributes:
        loss: task loss + alpha * divergence, to be differentiated.
        task_loss: the task's own, detached.
        divergence: mean over the compared rows, detached.
        outputs: what the model returned in the clean pass.
    """

    loss: Tensor
    task_loss: Tensor
    divergence: Tensor
    outputs: Any

    @property
    def logits(self) -> Tensor:
        """Logits of the clean pass.

        Raises:
            ValueError: none were formed.
        """
        if isinstance(self.outputs, Tensor):
            return self.outputs
        found = self.outputs["logits"] if isinstance(self.outputs, Mapping) else self.outputs.logits
        if found is None:
            raise ValueError(
                "logits: none are formed where a linear head is fused; AdversarialConfig(fused_head=False) forms them"
            )
        return found


class AdversarialObjective:
    """Wraps a model so that one call computes the adversarial training loss; the training loop stays as it is.

    Args:
        model: a module called as ``model(**batch)``; ``DistributedDataParallel`` around it is seen through.
        config: the method and its constants.
        head: ``"classification"``, ``"regression"``, ``"masked_lm"``, ``"causal_lm"`` or ``"pretraining"``; None
            recognises it from the model's class.
        loss: ``loss(outputs, batch)`` of the task; None takes ``outputs.loss``, which the model computes from labels,
            or the same cross-entropy without the logits.

    A language model whose head is one linear projection is trained without its logits, on the hidden states of the
    compared rows, and a hook on the model sees the logits of a few classes only; where that is not possible it goes
    through the logits, and a warning says why. ``config.fused_head`` decides otherwise.

    Raises:
        ValueError: no head or no input embeddings are recognised, or a fused head was demanded and cannot be.

    Example:
        >>> import torch
        >>> from alum_kernels import AdversarialConfig, AdversarialObjective
        >>> class Classifier(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.embed, self.out = torch.nn.Embedding(50, 8), torch.nn.Linear(8, 3)
        ...     def forward(self, input_ids):
        ...         return self.out(self.embed(input_ids).tanh().mean(1))
        >>> adversarial = AdversarialObjective(
        ...     Classifier(),
        ...     AdversarialConfig.alum_finetuning(modules=("embed",)),
        ...     head="classification",
        ...     loss=lambda logits, batch: torch.nn.functional.cross_entropy(logits, batch["labels"]),
        ... )
        >>> batch = {"input_ids": torch.randint(50, (4, 6)), "labels": torch.randint(3, (4,))}
        >>> adversarial(**batch).loss.backward()
    """

    def __init__(
        self,
        model: nn.Module,
        config: AdversarialConfig,
        *,
        head: str | None = None,
        loss: LossFunction | None = None,
    ) -> None:
        self.model = model
        self.config = config
        inner = unwrap(model)
        self.head = detect_head(inner) if head is None else Head(head)
        self.telemetry = Telemetry()
        self._loss = loss
        self._hooks = PerturbationHooks(perturbed_modules(inner, config.modules))
        self._generator: torch.Generator | None = None
        self._generator_state: Tensor | None = None
        self._constants = DeviceConstants(config)
        self._steps = 0
        self._verified = False
        self.linear_head = self._find_linear_head()

    def __call__(self, **batch: Any) -> AdversarialOutput:
        """The loss of one batch, with a fresh draw of noise; call ``.loss.backward()`` on the result."""
        return self.forward(batch)

    def backward(
        self,
        batch: Mapping[str, Any],
        scale: float | Tensor = 1.0,
        backward: Callable[[Tensor], None] | None = None,
    ) -> dict[str, Tensor]:
        """All passes of one batch, backward included; gradients are in ``.grad``, as after ``loss.backward()``.

        Args:
            batch: arguments of the model, labels included.
            scale: factor on the loss, such as one over the number of accumulated batches.
            backward: how to differentiate, such as ``accelerator.backward``; None calls ``Tensor.backward``.

        Returns:
            Detached device scalars ``loss``, ``task_loss`` and ``divergence``, before ``scale``.
        """
        output = self.forward(batch)
        (backward or Tensor.backward)(output.loss * scale)
        return {"loss": output.loss.detach(), "task_loss": output.task_loss, "divergence": output.divergence}

    def forward(
        self,
        batch: Mapping[str, Any],
        *,
        clean_pass: CleanPass | None = None,
        standard_loss: bool = False,
        seed: Tensor | None = None,
        sample_offset: int = 0,
    ) -> AdversarialOutput:
        """The loss of one batch.

        Args:
            batch: arguments of the model, labels included.
            clean_pass: a trainer's own way to run the model on the batch, giving (task loss, model output); None runs
                ``model(**batch)``.
            standard_loss: the loss of ``clean_pass`` is the model's own mean over the labels, so that a linear head may
                stand in for it.
            seed: one-element int64 tensor, see :meth:`draw_seed`; None draws one. Batches that are accumulated into one
                optimizer step share a seed and differ in ``sample_offset``; then splitting changes nothing.
            sample_offset: place of the batch's first sample in the global batch.

        Raises:
            ValueError: the model gave no loss, or the batch lacks what the head needs.
            RuntimeError: a perturbed module did not run exactly once in the clean pass.
        """
        with dropout_off(self.model) if self.config.dropout == "off" else nullcontext():
            return self._forward(batch, clean_pass, standard_loss, seed, sample_offset)

    def _forward(
        self,
        batch: Mapping[str, Any],
        clean_pass: CleanPass | None,
        standard_loss: bool,
        seed: Tensor | None,
        sample_offset: int,
    ) -> AdversarialOutput:
        config = self.config
        device = device_of(unwrap(self.model))
        inputs = without_labels(batch)
        linear = self._linear_head_for(batch, clean_pass, standard_loss)
        random = RandomState(device) if config.dropout == "shared" else None
        passes: Passes
        with self._hooks.recording() as embeds:
            if linear is not None:
                passes = LinearPasses(self.head, batch, config.positions, linear)
                task_loss, outputs, clean = passes.run_clean(lambda: self.model(**inputs))
            else:
                passes = LogitPasses(self.head, batch, config.positions)
                task_loss, outputs = (clean_pass or (lambda: self._run_task(batch)))()
                clean = passes.read(outputs)

        def perturbed_pass(model: nn.Module, replace: Callable[[int, Tensor], Tensor | None]) -> list[Prediction]:
            if random is not None:
                random.restore()
            with self._hooks.replacing(replace):
                return passes.run(lambda: model(**inputs))

        perturbation = Perturbation(
            config,
            self._constants,
            embeds,
            batch,
            self.draw_seed(device) if seed is None else seed,
            sample_offset,
        )
        start: Tensor | None = None
        fixed = [part.detached() for part in clean]
        if config.steps > 1:
            fixed = [part.with_products() for part in fixed]
        for _ in range(config.steps):
            leaves = perturbation.leaves()
            with torch.enable_grad():
                adv = perturbed_pass(unwrap(self.model), lambda index, output, leaves=leaves: leaves[index].clone())
            total, grads = self._ascent_gradient(adv, fixed, leaves)
            perturbation.climb(grads)
            start = total if start is None else start

        self._steps += 1
        check_signal = config.signal_check_interval > 0 and self._steps % config.signal_check_interval == 0
        adv = perturbed_pass(
            self.model, partial(perturbation.final, telemetry=config.telemetry, keep_delta=check_signal)
        )
        means = mean_divergences(adv, clean, config)
        divergence = means.sum()
        if config.telemetry:
            climbed = {}
            if start is not None:
                climbed = {"start": start, "end": self._sum_of(adv, clean, means)}
            steps = torch.ones_like(divergence)
            self.telemetry.add(divergence=divergence, steps=steps, **climbed, **perturbation.figures())
        if check_signal:
            with torch.no_grad():
                half = perturbed_pass(unwrap(self.model), perturbation.halved)
            at_full, at_half = (divergence_sum(side, fixed, config, config.divergence) for side in (adv, half))
            self.telemetry.add(signal_full=at_full, signal_half=at_half)
        return AdversarialOutput(
            loss=task_loss + config.alpha * divergence,
            task_loss=task_loss.detach(),
            divergence=divergence.detach(),
            outputs=outputs,
        )

    def _find_linear_head(self) -> LinearHead | None:
        config, tokens = self.config, self.head.tokens is not None
        if config.fused_head is False or (config.fused_head is None and not tokens):
            return None
        unfused = {config.divergence, config.ascent_divergence} - set(LINEAR_DIVERGENCES)
        if not tokens:
            return self._refuse(f"its head is {self.head.name}")
        if self._loss is not None:
            return self._refuse("its task loss is the caller's, of the logits")
        if unfused:
            return self._refuse(f"there is no fused {', '.join(sorted(unfused))}")
        found = find_linear_head(unwrap(self.model))
        return self._refuse(found) if isinstance(found, str) else found

    def _linear_head_for(
        self, batch: Mapping[str, Any], clean_pass: CleanPass | None, standard_loss: bool
    ) -> LinearHead | None:
        """The linear head, if this batch can go through it; the first one with a label decides for all."""
        if self.linear_head is None:
            return None
        if clean_pass is not None and not standard_loss:
            self.linear_head = self._refuse("its clean pass is the caller's, of the logits")
        elif not self._verified and (sample := one_sample(self.head, batch)) is not None:
            reason = refusal(unwrap(self.model), self.head, sample, self.linear_head)
            self.linear_head = self.linear_head if reason is None else self._refuse(reason)
            self._verified = True
        return self.linear_head

    def _refuse(self, reason: str) -> None:
        name = type(unwrap(self.model)).__name__
        if self.config.fused_head:
            raise ValueError(
                f"fused_head: expected a model that can be trained without its logits, got {name}: {reason}"
            )
        warnings.warn(
            f"{name} is trained through its logits: {reason}. AdversarialConfig(fused_head=False) chooses that",
            stacklevel=2,
        )

    def _sum_of(self, adv: list[Prediction], clean: list[Prediction], means: Tensor) -> Tensor:
        """The divergence that the ascent climbed, summed over compared rows and heads."""
        if self.config.ascent_divergence == self.config.divergence:
            return sum(mean * side.rows() for mean, side in zip(means, clean, strict=True))
        return divergence_sum(adv, [part.detached() for part in clean], self.config, self.config.ascent_divergence)

    def draw_seed(self, device: torch.device | None = None) -> Tensor:
        """The next seed of the noise, a one-element int64 tensor on ``device`` (the model's, if None)."""
        device = device_of(unwrap(self.model)) if device is None else device
        device = torch.empty(0, device=device).device  # "cuda" and "cuda:0" are one place
        if self._generator is None or self._generator.device != device:
            self._generator = torch.Generator(device).manual_seed(self.config.seed)
            if self._generator_state is not None:
                self._generator.set_state(self._generator_state)
                self._generator_state = None
        return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device, generator=self._generator)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs so that the noise goes on where it stopped."""
        state = self._generator_state if self._generator is None else self._generator.get_state()
        return {"generator": state, "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._steps = state["steps"]
        self._generator, self._generator_state = None, state["generator"]

    def remove_hooks(self) -> None:
        """Take the wrapper's hooks off the model; the objective cannot be used afterwards."""
        self._hooks.remove()

    def _run_task(self, batch: Mapping[str, Any]) -> tuple[Tensor, Any]:
        if self._loss is not None:
            outputs = self.model(**without_labels(batch))
            return self._loss(outputs, batch), outputs
        outputs = self.model(**batch)
        loss = loss_of(outputs)
        if loss is None:
            raise ValueError(
                "batch: expected 'labels', since the model computed no loss; "
                f"got {', '.join(batch) or 'an empty batch'}. Pass loss= if the loss is your own"
            )
        return loss, outputs

    def _ascent_gradient(
        self, adv: Sequence[Prediction], clean: Sequence[Prediction], leaves: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """The summed inner divergence and its gradient to each leaf; no parameter receives one."""
        total, grads = sum_and_gradients(adv, clean, leaves, self.config, self.config.ascent_divergence)
        for name, grad in zip(self._hooks.names, grads, strict=True):
            if grad is None:
                raise ValueError(
                    f"modules: the predictions do not depend on the perturbed output of {name}; "
                    "a module that another perturbed module replaces cannot be perturbed as well"
                )
        return total, grads
