"""MT-DNN's adversarial loss written by hand in float64, and a network with its calls."""

from collections.abc import Callable

import torch
from compared_rows import divergence_rows
from torch import Tensor, nn

from alum_kernels.integrations.mtdnn import TaskType

SAMPLES, POSITIONS, HIDDEN = 4, 5, 8
LARGE_STEP = 0.3
"""With which an ascent turns the perturbation, as the published 1e-3 hardly does."""


def inputs() -> dict[str, Tensor]:
    torch.manual_seed(3)
    lengths = torch.tensor([5, 3, 4, 5])
    return {
        "input_ids": torch.randint(20, (SAMPLES, POSITIONS)),
        "token_type_ids": torch.zeros(SAMPLES, POSITIONS, dtype=torch.int64),
        "attention_mask": (torch.arange(POSITIONS) < lengths[:, None]).long(),
    }


class Embeddings(nn.Module):
    """Words, positions and types."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(20, HIDDEN), nn.Embedding(POSITIONS, HIDDEN)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        return self.words(input_ids) + self.places.weight + 0 * token_type_ids.unsqueeze(-1)


class Network(nn.Module):
    """Called as MT-DNN's network is; ``own_calls`` hides its embeddings from a hook by their name."""

    def __init__(self, classes: int, own_calls: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.add_module("look_up" if own_calls else "embeddings", Embeddings())
        self.inner, self.scoring_list = nn.Linear(HIDDEN, HIDDEN), nn.ModuleList([nn.Linear(HIDDEN, classes)])
        self.double()

    def body(self, embeds: Tensor, attention_mask: Tensor, task_id: int = 0) -> Tensor:
        weight = attention_mask.unsqueeze(-1).to(embeds.dtype)
        pooled = (torch.tanh(self.inner(embeds)) * weight).sum(1) / weight.sum(1)
        return self.scoring_list[task_id](pooled)

    def embed(self, input_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        return (self.look_up if "look_up" in dict(self.named_children()) else self.embeddings)(
            input_ids, token_type_ids
        )

    def forward(
        self,
        input_ids,
        token_type_ids,
        attention_mask,
        premise_mask=None,
        hyp_mask=None,
        task_id=0,
        y_input_ids=None,
        fwd_type=0,
        embed=None,
    ):
        assert y_input_ids is None
        if fwd_type == 1:
            return self.embed(input_ids, token_type_ids)
        embeds = embed if fwd_type == 2 else self.embed(input_ids, token_type_ids)
        return self.body(embeds, attention_mask, task_id)


def written(
    logits_of: Callable[[Tensor], Tensor],
    embeds: Tensor,
    clean: Tensor,
    delta: Tensor,
    task: TaskType = TaskType.Classification,
    *,
    k: int = 1,
    norm_p: str = "inf",
    norm_level: int = 0,
    epsilon: float = 1e-6,
    pairwise: int = 1,
) -> tuple[Tensor, Tensor]:
    """The loss, and the mean magnitude of the last step's part in the perturbation."""
    dims = (1, 2) if norm_level else (2,)
    width = {TaskType.Regression: 1, TaskType.Ranking: pairwise}.get(task, clean.shape[-1])
    clean = clean.reshape(-1, width)

    def rows(logits: Tensor, gradient: str, divergence: str) -> Tensor:
        adv = logits.reshape(-1, width)
        if task == TaskType.Regression:
            return (adv - (clean.detach() if divergence == "kl" else clean)).square().sum(-1)
        return divergence_rows(adv, clean, divergence, gradient)

    for _ in range(k):
        delta = delta.detach().requires_grad_()
        (g,) = torch.autograd.grad(rows(logits_of(embeds.detach() + delta), "detach_clean", "kl").sum(), delta)
        moved = (delta + LARGE_STEP * g).detach()
        if norm_p == "l1":
            delta, share = moved.sign(), g.sign()
        else:
            size = moved.abs().amax(dims, True) if norm_p == "inf" else moved.square().sum(dims, True).sqrt()
            delta, share = moved / (size + epsilon), LARGE_STEP * g / (size + epsilon)
    loss = rows(logits_of(embeds + delta), "detach_targets", "symmetric_kl").mean()
    return loss, share.abs().mean()
