"""``SmartPerturbation`` of MT-DNN, the official SMART and ALUM code, on fused ops: the same constructor and call.

    from alum_kernels.integrations.mtdnn import SmartPerturbation      # was: from mt_dnn.perturbation

    delta_0 = noise_var N(0, 1)
    K times   g = d D(f(e + delta), f(e)) / d delta          D: KL summed over samples, or the squared error
              delta <- (delta + step_size g) / (max|delta + step_size g| + epsilon)      per token, or per sentence
    loss      l(f(e), f(e + delta)), each side's target detached; mean over samples

That rescaling makes delta's infinity norm nearly 1 whatever ``epsilon`` is: the constants' published names do not say
so, and nothing is clipped to 1e-5 as in the papers. It is kept, since it is the method that this code runs.

Where that code is broken, this does what it means:

- It passes ``fwd_type`` by position, where ``SANBertNetwork`` now takes ``y_input_ids``; here it goes by name.
- A network feeds the whole output of its embeddings back as ``inputs_embeds``, so position and type embeddings, layer
  norm and dropout come twice. Here a hook perturbs that output where it is, in an ordinary pass.
- Its attention mask is unused; here padding stays as it is, and counts in no norm.
- A non-finite gradient makes it return the integer 0, which its caller cannot unpack, and a step without an adversary
  would pass for one with. Here the groups concerned take no step, ``non_finite`` counts their elements, and a
  prediction that is not finite makes the loss so.
- ``norm_p`` "l2" and "l1", and ``norm_level`` 1, end in an error there; here they work.
- Ranking compares (pairs, pairwise) logits with (samples, 1) ones; here both are (pairs, pairwise).
- Its ascent climbs a surrogate of the KL, in fp32 log odds that lose most digits at a perturbation of 1e-5, whose
  gradient is up to four times as long and, beyond two classes, points a little elsewhere. Here it climbs the KL.

Source: mt_dnn/perturbation.py, mt_dnn/loss.py and mt_dnn/model.py of https://github.com/namisan/mt-dnn (676b48b).
"""

import inspect
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, nn

from alum_kernels.adversarial.heads import Head
from alum_kernels.adversarial.hooks import PerturbationHooks
from alum_kernels.adversarial.input_gradients import input_gradients
from alum_kernels.adversarial.model_state import original, unwrap
from alum_kernels.adversarial.predictions import FP16_GRAD_SCALE, in_fp16
from alum_kernels.adversarial.row_losses import widened
from alum_kernels.adversarial.sites import Site, perturbed_sites
from alum_kernels.integrations.rescaled_ascent import rescaled_ascent
from alum_kernels.ops.checks import check_choice, check_count, check_magnitude
from alum_kernels.ops.noise_init import noise_init
from alum_kernels.ops.squared_error import squared_error
from alum_kernels.ops.symmetric_kl import symmetric_kl

NORMS = ("inf", "l2", "l1")

Replace = Callable[[Tensor], Tensor]
Pass = Callable[[Replace], Tensor]
"""A pass of the model with its embeddings replaced, giving logits."""


class TaskType(IntEnum):
    """The tasks that are regularised, by MT-DNN's numbers: its own ``TaskType`` is taken as well."""

    Classification = 1
    Regression = 2
    Ranking = 3


class SymKlCriterion(nn.Module):
    """MT-DNN's criterion of that name: alpha (KL(p || q) + KL(q || p)), targets detached, over the number of samples.

    Args:
        alpha: factor.
        name: kept.
    """

    def __init__(self, alpha: float = 1.0, name: str = "KL Div Criterion") -> None:
        super().__init__()
        self.alpha, self.name = alpha, name

    def forward(
        self,
        input: Tensor,  # noqa: A002
        target: Tensor,
        weight: Tensor | None = None,
        ignore_index: int = -1,
        reduction: str = "batchmean",
    ) -> Tensor:
        """``input`` and ``target`` are (N, V) logits of either side; ``weight`` and ``ignore_index`` are unused."""
        return self.alpha * symmetric_kl(target, input, reduction=reduction, gradient="detach_targets")


class SmartPerturbation:
    """The adversarial loss of a batch, given the logits of its clean pass.

    Args:
        epsilon: added to the norm that delta is divided by; > 0.
        multi_gpu_on, fp16, encoder_type: kept; they change nothing, there or here.
        step_size: eta, factor on the gradient.
        noise_var: sigma, standard deviation of the noise.
        norm_p: ``"inf"`` (one fused op), ``"l2"``, or ``"l1"``, which is the sign.
        k: ascents.
        loss_map: the criterion of each task, called ``criterion(logits, adv_logits, ignore_index=-1)``; empty takes
            :class:`SymKlCriterion`, and for regression the mean squared error.
        norm_level: 0 for a norm of each token, above for one of each sentence.
        modules: the module whose output is perturbed, by name; empty takes the one called ``embeddings``, or else the
            model's input embeddings.

    Attributes:
        non_finite: elements of the last call's gradients that were not finite, an int64 scalar on the device.

    Raises:
        TypeError, ValueError: a constant of the wrong type or sign; the message names it.

    Example:
        >>> import torch
        >>> from alum_kernels.integrations.mtdnn import SmartPerturbation
        >>> class Classifier(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.embeddings, self.out = torch.nn.Embedding(50, 8), torch.nn.Linear(8, 3)
        ...     def forward(self, input_ids, attention_mask):
        ...         return self.out(self.embeddings(input_ids).tanh().mean(1))
        >>> model, input_ids = Classifier(), torch.randint(50, (4, 6))
        >>> mask = torch.ones_like(input_ids)
        >>> teacher = SmartPerturbation()
        >>> loss, embed_size, step_share = teacher.forward(model, model(input_ids, mask), input_ids, None, mask)
        >>> loss.backward()
        >>> bool(loss > 0), int(teacher.non_finite)
        (True, 0)
    """

    def __init__(
        self,
        epsilon: float = 1e-6,
        multi_gpu_on: bool = False,
        step_size: float = 1e-3,
        noise_var: float = 1e-5,
        norm_p: str = "inf",
        k: int = 1,
        fp16: bool = False,
        encoder_type: int = 1,
        loss_map: Sequence[Callable[..., Tensor]] = (),
        norm_level: int = 0,
        *,
        modules: Sequence[str] = (),
    ) -> None:
        for name, value in (("epsilon", epsilon), ("step_size", step_size), ("noise_var", noise_var)):
            check_magnitude(name, value)
        if epsilon == 0:
            raise ValueError("epsilon: expected a number > 0, got 0")
        check_choice("norm_p", norm_p, NORMS)
        self.epsilon, self.step_size, self.noise_var, self.norm_p = epsilon, step_size, noise_var, norm_p
        self.multi_gpu_on, self.fp16, self.encoder_type = multi_gpu_on, fp16, encoder_type
        self.K = check_count("k", k, 1)
        self.loss_map = loss_map
        self.norm_level = norm_level > 0
        self.non_finite: Tensor | None = None
        self._modules = tuple(modules)
        self._hooks: tuple[nn.Module, PerturbationHooks | None] | None = None

    def forward(
        self,
        model: nn.Module,
        logits: Tensor,
        input_ids: Tensor,
        token_type_ids: Tensor | None,
        attention_mask: Tensor | None,
        premise_mask: Tensor | None = None,
        hyp_mask: Tensor | None = None,
        task_id: int = 0,
        task_type: int = TaskType.Classification,
        pairwise: int = 1,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The adversarial loss, to be added to the task's.

        Args:
            model: an MT-DNN network, called ``model(input_ids, token_type_ids, attention_mask, premise_mask, hyp_mask,
                task_id)``; one without a module called ``embeddings`` also with ``fwd_type=1`` for its embeddings and
                ``fwd_type=2, embed=...`` to go on from them. Or any other model, called with ``input_ids``,
                ``attention_mask`` and, unless it is None, ``token_type_ids`` by name, giving logits or an output that
                has them. ``DistributedDataParallel`` is seen through.
            logits: (N, V) of the clean pass, part of its graph.
            input_ids, token_type_ids, attention_mask: (B, S); the mask is None where there is no padding.
            premise_mask, hyp_mask: of an MT-DNN network.
            task_id: index into ``loss_map``.
            task_type: of :class:`TaskType`.
            pairwise: candidates that a ranking task compares.

        Returns:
            The loss; the mean magnitude of the embeddings; and that of the last step's part in delta, step_size |g| /
            (max|delta + step_size g| + epsilon), 0 where no step was taken. The last two carry no graph.

        Raises:
            ValueError: another task, or a task without criterion; a model without embeddings that a hook can reach, or
                whose logits do not depend on them, or with reentrant checkpoints.
            RuntimeError: the perturbed module did not run exactly once in a pass.
        """
        if task_type not in tuple(TaskType):
            raise ValueError(f"task_type: expected one of {', '.join(map(repr, TaskType))}, got {task_type!r}")
        if self.loss_map and not 0 <= task_id < len(self.loss_map):
            raise ValueError(f"task_id: expected an index into {len(self.loss_map)} criteria, got {task_id}")
        network = (input_ids, token_type_ids, attention_mask, premise_mask, hyp_mask, task_id)
        run = self._pass_of(model, network)
        climb = _Climb(self, attention_mask)
        clean = _rows(logits, task_type, pairwise)
        head = Head("regression" if task_type == TaskType.Regression else "classification")
        for _ in range(self.K):
            with torch.enable_grad():
                adv = _rows(run(climb.leave), task_type, pairwise)
            scale = FP16_GRAD_SCALE if in_fp16(adv) else 1.0
            _, upstream = head.divergence_and_gradient(
                adv.detach(),
                clean.detach().to(adv.dtype),
                None,
                divergence="kl",
                temperature=1.0,
                grad_scale=scale,
                backend=None,
            )
            (grad,) = input_gradients(adv, [climb.leaf], upstream)
            if grad is None:
                raise ValueError(f"model: expected logits of its embeddings, those of {type(model).__name__} are not")
            climb.up(widened(grad) / scale)
        adv = _rows(run(climb.arrive), task_type, pairwise)
        self.non_finite = climb.non_finite
        return self._loss(clean, adv, task_id, task_type), climb.embed.abs().mean(), climb.step_share

    def remove_hooks(self) -> None:
        """Take the hook off the model of the last call."""
        if self._hooks is not None and self._hooks[1] is not None:
            self._hooks[1].remove()
        self._hooks = None

    def _loss(self, clean: Tensor, adv: Tensor, task_id: int, task_type: int) -> Tensor:
        regression = task_type == TaskType.Regression
        if not self.loss_map:
            wide = torch.promote_types(clean.dtype, adv.dtype)  # a caller may have widened his logits
            clean, adv = clean.to(wide), adv.to(wide)
            return squared_error(adv, clean) if regression else SymKlCriterion()(clean, adv)
        # a criterion that drops the last dimension of one side would compare every sample with every other
        clean, adv = (clean.flatten(), adv.flatten()) if regression else (clean, adv)
        return self.loss_map[task_id](clean, adv, ignore_index=-1)

    def _pass_of(self, model: nn.Module, network: tuple[Any, ...]) -> Pass:
        inner = unwrap(model)
        own_calls = "fwd_type" in inspect.signature(original(model).forward).parameters
        hooks = self._hooks_on(original(model), own_calls)
        if hooks is None:
            return _OwnCalls(inner, network)
        inputs = {"input_ids": network[0], "attention_mask": network[2], "token_type_ids": network[1]}
        inputs = {name: tensor for name, tensor in inputs.items() if tensor is not None}

        def run(replace: Replace) -> Tensor:
            with hooks.replacing(lambda index, embed: replace(embed)):
                output = inner(*network) if own_calls else inner(**inputs)
            hooks.check_calls()
            return _logits(output)

        return run

    def _hooks_on(self, model: nn.Module, own_calls: bool) -> PerturbationHooks | None:
        """Those of the last call, on the same model, or new ones; None where the network's own calls do without."""
        if self._hooks is None or self._hooks[0] is not model:
            self.remove_hooks()
            site = self._site(model, own_calls)
            self._hooks = (model, None if site is None else PerturbationHooks([site]))
        return self._hooks[1]

    def _site(self, model: nn.Module, own_calls: bool) -> Site | None:
        if self._modules:
            return perturbed_sites(model, self._modules)[0]
        found = [(name, module) for name, module in model.named_modules() if name.rpartition(".")[2] == "embeddings"]
        if len(found) == 1:
            return Site(*found[0])
        return None if own_calls else perturbed_sites(model)[0]


class _OwnCalls:
    """Passes of a network by its own calls: its embeddings, and what it makes of them."""

    def __init__(self, model: nn.Module, arguments: tuple[Any, ...]) -> None:
        self._model, self._arguments = model, arguments
        self._embed = model(*arguments, fwd_type=1)

    def __call__(self, replace: Replace) -> Tensor:
        return _logits(self._model(*self._arguments, fwd_type=2, embed=replace(self._embed)))


class _Climb:
    """The perturbation of one call: where it is, and the embeddings there."""

    def __init__(self, constants: SmartPerturbation, mask: Tensor | None) -> None:
        self._constants, self._mask = constants, mask
        self._dims = (-2, -1) if constants.norm_level else (-1,)
        self._grad: Tensor | None = None
        self._delta: Tensor | None = None
        self.leaf: Tensor | None = None
        self.embed: Tensor | None = None
        self.step_share: Tensor | None = None
        self.non_finite: Tensor | int = 0

    def leave(self, embed: Tensor) -> Tensor:
        """The embeddings at the present perturbation, as a leaf; the model goes on with a copy."""
        self.leaf = self._perturbed(embed.detach()).requires_grad_()
        return self.leaf.clone()

    def up(self, grad: Tensor) -> None:
        """Go along a gradient next, fp32 (fp64 for fp64)."""
        self._grad = grad

    def arrive(self, embed: Tensor) -> Tensor:
        """The live embeddings at the last perturbation."""
        self.embed = embed.detach()
        return self._perturbed(embed)

    def _perturbed(self, embed: Tensor) -> Tensor:
        if self._grad is None:
            noise = {"std": self._constants.noise_var, "mask": self._mask, "return_delta": True}
            perturbed, self._delta = noise_init(embed, **noise)
            return perturbed
        grad, self._grad = self._grad, None
        self.non_finite = self.non_finite + (~grad.isfinite()).sum()
        return self._ascended(embed, grad)

    def _ascended(self, embed: Tensor, grad: Tensor) -> Tensor:
        own = self._constants
        moves = grad.isfinite().all(self._dims, keepdim=True)
        if self._mask is not None:
            moves = moves & (self._mask != 0).unsqueeze(-1)
        step = torch.where(moves, own.step_size * grad, 0)
        target = self._delta + step
        self.step_share = self._rescaled(step, target).abs().mean()
        if own.norm_p != "inf":
            self._delta = self._rescaled(target, target)
            return (embed + self._delta).to(embed.dtype)
        level = "sequence" if own.norm_level else "token"
        sizes = {"step_size": own.step_size, "epsilon": own.epsilon, "level": level}
        perturbed, self._delta = rescaled_ascent(embed, grad, self._delta, mask=self._mask, **sizes)
        return perturbed

    def _rescaled(self, part: Tensor, whole: Tensor) -> Tensor:
        """A part of a perturbation, as the whole is rescaled."""
        own = self._constants
        if own.norm_p == "l1":
            return part.sign()
        order = 2 if own.norm_p == "l2" else torch.inf
        return part / (torch.linalg.vector_norm(whole, order, self._dims, keepdim=True) + own.epsilon)


def _rows(logits: Tensor, task_type: int, pairwise: int) -> Tensor:
    """(N, V): of each sample, or of each set of candidates; (N, 1) of a regression."""
    width = {TaskType.Regression: 1, TaskType.Ranking: pairwise}.get(task_type, logits.shape[-1])
    return logits.reshape(-1, width)


def _logits(output: Any) -> Tensor:
    return Head("classification").logits(output)
