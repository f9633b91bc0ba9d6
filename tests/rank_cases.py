"""Steps that ranks share, each with a part of one batch: what they train, and how the samples are dealt out.

Run as a program, ``python tests/rank_cases.py FOLDER``, it is one rank of ``processes.run_ranks``. Rank 0 leaves the
gradients of every case in ``gradients-RANKS.pt``.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny_models
import torch
from processes import join_group
from torch import Tensor, distributed, nn

from alum_kernels import AdversarialConfig, AdversarialObjective

SAMPLES = 8
MOVED = AdversarialConfig(alpha=5.0, std=1e-2, step_size=2e-2, epsilon=2e-2, normalize="linf", steps=2)
ON_THE_WAY = AdversarialConfig.freelb(std=0.1, step_size=0.2, epsilon=0.3)
RAW = AdversarialConfig.pgd(std=0.1, step_size=20.0, epsilon=0.3, normalize="none")
SEED = 3

UNEVEN = {1: (8,), 2: (3, 5), 4: (1, 3, 2, 2)}
EVEN = {1: (8,), 2: (4, 4), 4: (2, 2, 2, 2)}
ONE_WITHOUT = {1: (8,), 2: (8, 0), 4: (3, 0, 4, 1)}


@dataclass(frozen=True)
class Case:
    """One step.

    Attributes:
        task: of the model.
        config: the method.
        shares: for each number of ranks, how many samples each has.
        options: of ``DistributedDataParallel``.
        unlabelled: samples from this one on have no label.
        recomputes: layers are recomputed in the backward.
        tied: a causal language model's output projection has the weight of its embeddings.
    """

    task: str
    config: AdversarialConfig = MOVED
    shares: dict[int, tuple[int, ...]] = field(default_factory=lambda: UNEVEN)
    options: dict[str, bool] = field(default_factory=dict)
    unlabelled: int | None = None
    recomputes: bool = False
    tied: bool = True

    def batch(self) -> dict[str, Tensor]:
        """All samples, float64."""
        if self.task == "pretraining":
            batch = tiny_models.pretraining_batch(SAMPLES)
        else:
            batch = tiny_models.batch("classification" if self.task == "bag" else self.task, SAMPLES)
        if self.task == "classification":
            batch["labels"][2] = -100  # counts in no mean of the task, but is compared
        if self.unlabelled is not None:
            batch["labels"][self.unlabelled :] = -100
        return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}

    def model(self) -> nn.Module:
        """Without dropout, float64, the same on every rank."""
        if self.task == "bag":
            return tiny_models.BagOfEmbeddings().double()
        if self.task == "pretraining":
            return tiny_models.bert_pretraining().double()
        family, options = ("gpt2", {"tie_word_embeddings": self.tied}) if self.task == "causal_lm" else ("bert", {})
        model = tiny_models.make(family, self.task, dtype=torch.float64, **options)
        if self.recomputes:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model

    def share(self, rank: int, ranks: int) -> tuple[dict[str, Tensor], int]:
        """The samples of one rank, and the place of the first."""
        begin = sum(self.shares[ranks][:rank])
        end = begin + self.shares[ranks][rank]
        return {name: value[begin:end] for name, value in self.batch().items()}, begin


LOGITS = {"fused_head": False}
CASES = {
    "classification": Case("classification"),
    "regression": Case("regression"),
    "spans": Case("spans"),
    "token labels": Case("token_labels"),
    "masked_lm": Case("masked_lm"),
    "masked_lm, logits": Case("masked_lm", MOVED.replace(**LOGITS)),
    "masked_lm, all positions": Case("masked_lm", MOVED.replace(positions="all")),
    "masked_lm, capacity": Case("masked_lm", MOVED.replace(labelled_capacity=0.9)),
    "causal_lm": Case("causal_lm"),
    "pretraining": Case("pretraining"),
    "pretraining, logits": Case("pretraining", MOVED.replace(**LOGITS)),
    "freelb": Case("classification", ON_THE_WAY),
    "pgd, raw gradient": Case("classification", RAW),
    "llr": Case("classification", AdversarialConfig.llr()),
    "low memory": Case("classification", MOVED.replace(memory="low")),
    "low memory, masked_lm": Case("masked_lm", MOVED.replace(memory="low")),
    "signal check": Case("classification", MOVED.replace(signal_check_interval=1)),
    "recomputed": Case("classification", recomputes=True),
    "depth": Case("classification", MOVED.replace(ascent_depth=1)),
    "fraction": Case("masked_lm", MOVED.replace(adversarial_fraction=0.5), EVEN),
    "fraction, logits": Case("masked_lm", MOVED.replace(adversarial_fraction=0.5, **LOGITS), EVEN),
    "no adversary yet": Case("masked_lm", MOVED.replace(start=10)),
    "proximal": Case("classification", MOVED.replace(proximal=1.0)),
    "static graph": Case("classification", options={"static_graph": True}),
    "static graph, pgd": Case("classification", RAW, options={"static_graph": True}),
    "unused looked for": Case("classification", options={"find_unused_parameters": True}),
    "unused looked for, masked_lm": Case("masked_lm", options={"find_unused_parameters": True}),
    "unused looked for, freelb": Case("classification", ON_THE_WAY, options={"find_unused_parameters": True}),
    "a rank without labels": Case("masked_lm", unlabelled=3),
    "a rank without labels, logits": Case("masked_lm", MOVED.replace(**LOGITS), unlabelled=3),
    "a rank without labels, classification": Case("classification", unlabelled=3),
    "a rank without labels, low memory": Case("masked_lm", MOVED.replace(memory="low"), unlabelled=3),
    "no label at all": Case("masked_lm", unlabelled=0),
    # a transformer of Hugging Face's cannot run on no sample
    "a rank without samples": Case("bag", MOVED.replace(modules=("embed",)), ONE_WITHOUT),
}


def gradients(
    case: Case, model: nn.Module, rank: int = 0, ranks: int = 1, *, steps: int = 1
) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients by name of the last of so many equal steps, and its loss, averaged over ranks."""
    group = distributed.group.WORLD if ranks > 1 else None
    plain = {"head": "classification", "loss": cross_entropy} if case.task == "bag" else {}
    objective = AdversarialObjective(model, case.config, process_group=group, **plain)
    own, begin = case.share(rank, ranks)
    if case.config.proximal:
        objective.follow(torch.optim.SGD(model.parameters(), lr=0.1))
        move(model)  # away from its teacher
    for _ in range(steps):
        model.zero_grad()
        figures = objective.backward(own, seed=torch.tensor([SEED]), sample_offset=begin)
    objective.remove_hooks()
    loss = figures["loss"].double()
    if ranks > 1:
        distributed.all_reduce(loss)
    inner = getattr(model, "module", model)
    found = {name: whole(parameter.grad) for name, parameter in inner.named_parameters()}
    return {name: grad for name, grad in found.items() if grad is not None}, loss / ranks


def cross_entropy(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(logits, batch["labels"])


def whole(tensor: Any) -> Tensor | None:
    """A gradient, gathered where it is sharded."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@torch.no_grad()
def move(model: nn.Module) -> None:
    """Every parameter by a little, in the same way on every rank."""
    for parameter in model.parameters():
        parameter.add_(0.01 * torch.sin(torch.arange(parameter.numel(), dtype=parameter.dtype).view_as(parameter)))


def as_rank(work: Callable[[Path, int, int], dict[str, Any]]) -> None:
    """What a rank's program does: what ``work(folder, rank, ranks)`` returns on rank 0 is left in the folder."""
    folder = Path(sys.argv[1])
    rank, ranks = join_group(folder)
    found = work(folder, rank, ranks)
    if rank == 0:
        torch.save(found, folder / f"gradients-{ranks}.pt")
    distributed.destroy_process_group()


def in_parallel(folder: Path, rank: int, ranks: int) -> dict[str, Any]:
    """Every case under ``DistributedDataParallel``."""
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        model = nn.parallel.DistributedDataParallel(case.model(), **case.options)
        recorded = case.options.get("static_graph", False)  # in the first step
        found[name] = gradients(case, model, rank, ranks, steps=2 if recorded else 1)
    found["refused"] = refusals()
    found["not finite"] = not_finite(rank, ranks)
    return found


def refusals() -> list[str]:
    """What methods with several backwards say to a static graph."""
    said = []
    for config in (ON_THE_WAY, MOVED.replace(memory="low")):
        case = Case("classification", config)
        model = nn.parallel.DistributedDataParallel(case.model(), static_graph=True)
        try:
            gradients(case, model, 0, 1)
        except ValueError as error:
            said.append(str(error))
    return said


def not_finite(rank: int, ranks: int) -> list[list[float]]:
    """Norms of the gradient: a finite step, one in which the last rank has a number that is none, and a finite one."""
    case, norms = Case("regression", shares=EVEN), []
    own, begin = case.share(rank, ranks)
    model = nn.parallel.DistributedDataParallel(case.model())
    objective = AdversarialObjective(model, case.config, process_group=distributed.group.WORLD)
    for value in (0.0, torch.nan, 0.0):
        labels = own["labels"] + value * (rank == ranks - 1)
        model.zero_grad()
        objective.backward({**own, "labels": labels}, seed=torch.tensor([SEED]), sample_offset=begin)
        norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm()
        of_all = [torch.zeros_like(norm) for _ in range(ranks)]
        distributed.all_gather(of_all, norm)
        norms.append([float(each) for each in of_all])
    return norms


if __name__ == "__main__":
    as_rank(in_parallel)
