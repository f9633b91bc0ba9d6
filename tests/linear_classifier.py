"""A classifier that is linear in its embeddings, for which the worst perturbation of a ball is known in closed form."""

import torch
from torch import Tensor, nn

LENGTHS = (5, 3, 4, 1, 5, 2)
BALLS = (("l2", "sequence"), ("l2", "token"), ("linf", "token"))


class LinearClassifier(nn.Module):
    """Logits (B, 2): the sum of the embeddings of a sample, times a matrix."""

    def __init__(self, hidden: int = 6) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.embed = nn.Embedding.from_pretrained(torch.randn(20, hidden, generator=generator).double(), freeze=False)
        self.weight = nn.Parameter(torch.randn(hidden, 2, generator=generator).double())

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return (self.embed(input_ids) * attention_mask.unsqueeze(-1)).sum(1) @ self.weight

    def direction(self) -> Tensor:
        """(H,) gradient of the first logit over the second, at every token."""
        return (self.weight[:, 0] - self.weight[:, 1]).detach()


def batch() -> dict[str, Tensor]:
    lengths = torch.tensor(LENGTHS)
    return {
        "input_ids": torch.arange(len(LENGTHS) * 5).reshape(-1, 5) % 20,
        "attention_mask": (torch.arange(5) < lengths[:, None]).long(),
        "labels": torch.arange(len(LENGTHS)) % 2,
    }


def margins(model: LinearClassifier, batch: dict[str, Tensor]) -> Tensor:
    """(B,) logit of the label over that of the other class."""
    logits = model(batch["input_ids"], batch["attention_mask"]).detach()
    difference = logits[:, 0] - logits[:, 1]
    return torch.where(batch["labels"] == 0, difference, -difference)


def reach(model: LinearClassifier, norm: str, level: str) -> Tensor:
    """(B,) how much of a sample's margin a ball of radius 1 can take: the dual norm of the margin's gradient."""
    w, lengths = model.direction(), torch.tensor(LENGTHS, dtype=torch.float64)
    if norm == "linf":
        return lengths * w.abs().sum()
    return (lengths if level == "token" else lengths.sqrt()) * w.norm()


def cut(batch: dict[str, Tensor], *sizes: int) -> list[dict[str, Tensor]]:
    """The batch in pieces of the given sizes."""
    pieces = {name: value.split(sizes) for name, value in batch.items()}
    return [{name: pieces[name][index] for name in batch} for index in range(len(sizes))]
