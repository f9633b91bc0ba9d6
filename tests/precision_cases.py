"""Steps in fp32, bf16 and fp16, by one process or by two ranks with a part of the batch each.

Run as a program it is one rank, like rank_cases.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import rank_cases
import tiny_models
import torch
from rank_cases import EVEN, ON_THE_WAY, SEED, UNEVEN, Case
from sharded_cases import LOGITS, sharded
from tiny_loops import FAR
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, register_fsdp_forward_method

from alum_kernels import AdversarialObjective
from alum_kernels.integrations.mtdnn import SmartPerturbation
from alum_kernels.integrations.smart_pytorch import SMARTLoss, kl_loss, sym_kl_loss

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
SCALE = 2.0**12

CASES = {
    "classification": Case("classification", FAR, UNEVEN),
    "masked_lm": Case("masked_lm", FAR, UNEVEN),
    "masked_lm, logits": Case("masked_lm", FAR.replace(**LOGITS), UNEVEN),
    "low memory": Case("masked_lm", FAR.replace(memory="low", **LOGITS), UNEVEN),
    "freelb": Case("classification", ON_THE_WAY, UNEVEN),
}
BATCH = tiny_models.classification_batch(rank_cases.SAMPLES)


class Training:
    """A model in fp32, its optimizer and its scaler, which scales in fp16 alone."""

    def __init__(self, model: nn.Module, precision: str, *, by_autocast: bool = True) -> None:
        self.model, self.autocast = model, PRECISIONS[precision] if by_autocast else None
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, enabled=precision == "fp16")

    def step(self, case: Case, rank: int, ranks: int, factor: float = 1.0) -> None:
        """Gradients of a step, scaled; ``factor`` is this rank's own, on its loss."""
        group = distributed.group.WORLD if ranks > 1 else None
        own, begin = case.share(rank, ranks)
        objective = AdversarialObjective(self.model, case.config, process_group=group)
        with torch.autocast("cpu", self.autocast, enabled=self.autocast is not None):
            objective.backward(
                own,
                seed=torch.tensor([SEED]),
                sample_offset=begin,
                backward=lambda loss: self.scaler.scale(loss * factor).backward(),
            )
        objective.remove_hooks()

    def gradient(self) -> Tensor:
        """Unscaled and flat."""
        self.scaler.unscale_(self.optimizer)
        gradient = flat(parameter.grad for parameter in self.model.parameters())
        assert gradient.dtype == torch.float32
        return gradient

    def update(self) -> None:
        """The optimizer's step, if the scaler makes it."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()


def flat(tensors: Any) -> Tensor:
    return torch.cat([rank_cases.whole(tensor.detach()).flatten() for tensor in tensors if tensor is not None])


def alone(name: str, precision: str) -> Tensor:
    """The gradient of one process under autocast."""
    training = Training(CASES[name].model().float(), precision)
    training.step(CASES[name], 0, 1)
    return training.gradient()


def smart_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The task's loss and ``SMARTLoss``, whose passes are calls of the model as it is trained."""
    mask = batch["attention_mask"]

    def logits_of(embed: Tensor) -> Tensor:
        return model(inputs_embeds=embed, attention_mask=mask).logits

    embed = looked_up(model, batch["input_ids"])
    state = logits_of(embed)
    adversarial = SMARTLoss(logits_of, kl_loss, sym_kl_loss, step_size=0.3, noise_var=0.1, epsilon=1.0)(embed, state)
    return nn.functional.cross_entropy(state, batch["labels"]) + adversarial


def looked_up(model: nn.Module, ids: Tensor) -> Tensor:
    """Embeddings, outside of the model's forward; where it is sharded, in a method that gathers as a forward does."""
    inner = getattr(model, "module", model)
    if not isinstance(inner, FSDPModule):
        return inner.get_input_embeddings()(ids)
    if not hasattr(inner, "look_up"):
        inner.look_up = lambda ids: inner.get_input_embeddings()(ids)
        register_fsdp_forward_method(inner, "look_up")
    return inner.look_up(ids)


def smart_perturbation(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The task's loss and ``SmartPerturbation``'s."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    logits = model(input_ids=ids, attention_mask=mask).logits
    teacher = SmartPerturbation(step_size=0.3, noise_var=0.1, epsilon=1.0)
    adversarial, *_ = teacher.forward(model, logits, ids, None, mask)
    teacher.remove_hooks()
    return nn.functional.cross_entropy(logits, batch["labels"]) + 5 * adversarial


DROP_INS: dict[str, Callable[[nn.Module, dict[str, Tensor]], Tensor]] = {
    "SMARTLoss": smart_loss,
    "SmartPerturbation": smart_perturbation,
}


def drop_in(
    name: str, precision: str, model: nn.Module, own: list[int], ranks: int, *, by_autocast: bool = True
) -> Tensor:
    """The gradient of a drop-in, averaged over the shares of some ranks, each with noise of its own."""
    training = Training(model, precision, by_autocast=by_autocast)
    size = rank_cases.SAMPLES // ranks
    for rank in own:
        part = {key: value[rank * size :][:size] for key, value in BATCH.items()}
        torch.manual_seed(rank)
        with torch.autocast("cpu", training.autocast, enabled=training.autocast is not None):
            loss = DROP_INS[name](model, part) / len(own)
        training.scaler.scale(loss).backward()
    return training.gradient()


def exact_drop_in(name: str, model: nn.Module, own: list[int], ranks: int) -> Tensor:
    """The same in fp64, of a model in fp64."""
    size = rank_cases.SAMPLES // ranks
    for rank in own:
        torch.manual_seed(rank)
        loss = DROP_INS[name](model, {key: value[rank * size :][:size] for key, value in BATCH.items()})
        (loss / len(own)).backward()
    return flat(parameter.grad for parameter in model.parameters())


def overflow(model: nn.Module, case: Case, rank: int, ranks: int, *, by_autocast: bool = True) -> dict[str, Any]:
    """What every rank has after a step in which the last one overflows, and after one in which none does."""
    training = Training(model, "fp16", by_autocast=by_autocast)
    before, found = flat(model.parameters()), {}
    stages = {"overflow": 2.0**60, **({} if by_autocast else {"in one shard": 1.0}), "finite": 1.0}
    for name, factor in stages.items():
        training.step(case, rank, ranks, factor if rank == ranks - 1 else 1.0)
        if name == "in one shard" and rank == 0:  # the other rank has no part of that element
            model.classifier.bias.grad.to_local()[0] = torch.inf
        training.update()
        after = flat(model.parameters())
        of_all = [torch.zeros_like(after) for _ in range(ranks)]
        distributed.all_gather(of_all, after)
        scales = [None] * ranks
        distributed.all_gather_object(scales, training.scaler.get_scale())
        found[name] = {"moved": [float((own - before).norm()) for own in of_all], "scales": scales}
        found[name]["equal"] = all(torch.equal(own, after) for own in of_all)
    return found


def work(folder: Path, rank: int, ranks: int) -> dict[str, Any]:
    """Every case in every precision, under ``DistributedDataParallel`` and under ``fully_shard``."""
    parallel, mesh = nn.parallel.DistributedDataParallel, init_device_mesh("cpu", (ranks,))
    found: dict[str, Any] = {
        "parallel": {},
        "sharded": {},
        "drop-in": {},
        "sharded drop-in": {},
        "exact drop-in": {},
        "overflow": {},
    }
    for precision, dtype in PRECISIONS.items():
        for name, case in CASES.items():
            training = Training(parallel(case.model().float()), precision)
            training.step(case, rank, ranks)
            found["parallel"][name, precision] = training.gradient()
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        for name in CASES:
            training = Training(
                sharded(CASES[name].model().float(), mesh, mp_policy=policy), precision, by_autocast=False
            )
            training.step(CASES[name], rank, ranks)
            found["sharded"][name, precision] = training.gradient()
        for name in DROP_INS:
            model = parallel(tiny_models.bert())
            found["drop-in"][name, precision] = drop_in(name, precision, model, [rank], ranks)
            model = sharded(tiny_models.bert(), mesh, mp_policy=policy)
            found["sharded drop-in"][name, precision] = drop_in(
                name, precision, model, [rank], ranks, by_autocast=False
            )
    for name in DROP_INS:
        ways: dict[str, Callable[[nn.Module], nn.Module]] = {
            "parallel": parallel,
            "kept": lambda model: sharded(model, mesh),
            "freed": lambda model: sharded(model, mesh, reshard_after_forward=True),
        }
        for way, spread in ways.items():
            model = spread(tiny_models.bert().double())
            found["exact drop-in"][name, way] = exact_drop_in(name, model, [rank], ranks)
    policy = MixedPrecisionPolicy(param_dtype=torch.float16, reduce_dtype=torch.float32)
    for name in ("classification", "freelb"):
        case = Case("classification", CASES[name].config, EVEN)
        found["overflow"]["parallel", name] = overflow(parallel(case.model().float()), case, rank, ranks)
        model = sharded(case.model().float(), mesh, mp_policy=policy)
        found["overflow"]["sharded", name] = overflow(model, case, rank, ranks, by_autocast=False)
    return found


if __name__ == "__main__":
    rank_cases.as_rank(work)
