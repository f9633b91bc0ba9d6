"""Pairs of logits of every kind, and what each row's divergence must be.

Kinds: *usual* is the domain in which the accuracy of the library is promised (logits of a few units to a few dozen, any
perturbation); *minute* and *huge* lie far below and above it, *shifted* far from zero, *opposed* are certain of
different classes, in *overtaken* rows a class without weight passes all others, *parted* ones lie at another level in
each part, whose classes, or one of them, move on their own, *equal* do not differ. Some rows are then spoilt: dead
classes (-inf), NaN, +inf.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from alum_kernels.backends.reference import symmetric_kl as reference
from fuzzing.draws import Draw, Held

COLUMNS = (
    (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64),
    (65, 66, 100, 127, 128, 129, 255, 256, 257, 511, 513, 1000),
    (1023, 1024, 1025, 2047, 2048, 2049, 4095, 4097),
    (8191, 8193, 9000, 16384, 16385, 30522, 50257),
)
STREAMED = (8193, 9000, 16385)
"""Of those, what a slow backend reads in more than one block."""
ROWS = (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 70)
KINDS = ("usual", "minute", "huge", "shifted", "opposed", "overtaken", "parted", "equal")
SPOILT = ("dead", "one-sided", "nan", "infinite", "empty", "alike")


def draw_shape(draw: Draw) -> tuple[int, ...]:
    """(..., V), at least one row dimension; few rows where there are many classes."""
    columns = draw.choice(
        draw.choice((*COLUMNS[:3], STREAMED) if draw.small else COLUMNS, (6, 2, 2, 1) if draw.small else (16, 8, 3, 1))
    )
    most = min(max(10_000 // columns, 2), 5 if draw.small else ROWS[-1])
    rows = draw.choice([n for n in ROWS if n <= most])
    leading = draw.choice(((rows,), (rows, draw.choice((1, 2, 3))), (draw.choice((1, 2)), rows, 2)), (5, 3, 1))
    return (*leading, columns)


def draw_pair(draw: Draw, shape: tuple[int, ...], kind: str) -> tuple[Tensor, Tensor]:
    """Adversarial and clean logits, float64."""
    scale, perturbation = draw.choice((0.01, 0.5, 3.0, 8.0)), draw.size(1e-6, 50)
    b = scale * draw.normal(*shape)
    raised = draw.indices(shape[-1], *shape[:-1], 1)
    if draw.chance(0.4):
        b.scatter_add_(-1, raised, torch.full(raised.shape, 24.0, dtype=b.dtype))
    change = perturbation * draw.normal(*shape)
    if kind == "minute":
        size = draw.size(1e-38, 1e-3)
        b, change = b * size, change * draw.choice((size, 1e-38, 1.0))
    elif kind == "huge":
        b, change = b * draw.size(1e2, 1e29), change * draw.size(1e-3, 1e28)
    elif kind == "shifted":
        b = b + draw.choice((-1, 1)) * draw.size(64, 3e4)
        change = change + draw.choice((0.0, 1.0, -1.0)) * draw.size(1, 3e4)
    elif kind == "opposed":
        gap = torch.full(raised.shape, draw.size(40, 1e4), dtype=b.dtype)
        b.scatter_add_(-1, raised, gap)
        change.scatter_add_(-1, raised, -gap)
        change.scatter_add_(-1, (raised + 1) % shape[-1], gap)
    elif kind == "overtaken":
        fall = draw.size(1, 200)
        change.scatter_add_(-1, raised, torch.full(raised.shape, fall + draw.size(0.1, 60), dtype=b.dtype))
        b.scatter_add_(-1, raised, torch.full(raised.shape, -fall, dtype=b.dtype))
    elif kind == "parted":
        part = torch.arange(shape[-1]) // draw.choice((100, 4096, 8192))
        level = draw.size(0.1, 120) * draw.normal(shape[-1])[part]
        move = draw.size(0.1, 60) * draw.choice((0.0, 1.0)) * draw.normal(shape[-1])[part]
        b, change = b + level, change + move
        one = draw.indices(shape[-1], *shape[:-1], 1)
        if draw.chance(0.5):  # it passes all others, wherever it was
            rise = (b + change).amax(-1, keepdim=True) - b.gather(-1, one) + draw.size(0.1, 40)
            change.scatter_(-1, one, rise)
        else:  # it is the largest of its part, and moves
            top = torch.where(part == part[one], b, -torch.inf).amax(-1, keepdim=True)
            b.scatter_(-1, one, top + 1)
            change.scatter_(-1, one, draw.choice((-1, 1)) * draw.size(1, 100))
    elif kind == "equal":
        change = torch.zeros_like(change)
    return b + change, b


def spoil(draw: Draw, a: Tensor, b: Tensor) -> None:
    """Make a few rows (N, V) of either side irregular, in place."""
    rows, columns = a.shape
    for _ in range(draw.integer(1, 4)):
        row, how = draw.integer(0, rows - 1), draw.choice(SPOILT, (4, 2, 2, 2, 1, 2))
        column = draw.integer(0, columns - 1)
        sides = draw.choice(((a,), (b,), (a, b)))
        if how == "dead":
            part = draw.uniform(columns) < draw.choice((0.1, 0.5, 0.95))
            a[row, part], b[row, part] = -torch.inf, -torch.inf
        elif how == "one-sided":
            draw.choice((a, b))[row, column] = -torch.inf
        elif how == "alike":
            a[row] = b[row]
        else:
            for side in sides:
                if how == "empty":
                    side[row] = -torch.inf
                else:
                    side[row, column] = torch.nan if how == "nan" else torch.inf


@dataclass
class Truth:
    """What float64 says of (N, V) logits; gradients are for an upstream factor of one, and not of the temperature."""

    loss: Tensor  # (N,); +inf for a class that is dead on one side, NaN for a row that has no divergence
    grad_a: Tensor  # (N, V)
    grad_b: Tensor
    undefined: Tensor  # (N,) the gradient is NaN
    dead: Tensor  # (N, V) -inf on both sides
    alike: Tensor  # (N,) the sides are equal
    weight: Tensor  # (N,) ||p|| + ||q||
    slope: Tensor  # (N,) sum |dJ/da| + |dJ/db|: what a change of the logits does to the loss
    reach: Tensor  # (N,) largest |logit| over the temperature
    change: Tensor  # (N,) largest |a - b| over the temperature
    common: Tensor  # (N,) the largest of what is taken off every difference and of what is left of that at the largest
    # a and b: |a - b| at the largest b, |a - b - that| at the largest a, |log p - log q| at the largest b
    terms: Tensor  # (N,) how many terms of one size would have the same sum and sum of squares as those of J


def truth(name: str, a: Tensor, b: Tensor, gradient: str, inv_temperature: float) -> Truth:
    """By the definition: irregular rows by rule, dead classes left out of the row, the rest in float64."""
    a, b = a.detach().double(), b.detach().double()
    rows, columns = a.shape
    nothing = (a == -torch.inf).all(-1) | (b == -torch.inf).all(-1)
    spoilt = ~(a < torch.inf).all(-1) | ~(b < torch.inf).all(-1) | (b == -torch.inf).all(-1)
    separated = ((a == -torch.inf) != (b == -torch.inf)).any(-1) & ~spoilt
    dead = (a == -torch.inf) & (b == -torch.inf)
    undefined = spoilt | separated | nothing
    loss, grad_a, grad_b = torch.zeros(rows).double(), torch.zeros(rows, columns).double(), torch.zeros_like(a)
    weight, slope, reach, change, common, terms = (torch.zeros(rows).double() for _ in range(6))
    loss[spoilt], loss[separated] = torch.nan, torch.inf
    options = {"divergence": name, "inv_temperature": inv_temperature}
    several = dead.any(-1) & ~undefined
    groups = [(~undefined & ~several).nonzero()[:, 0]] + [row.reshape(1) for row in several.nonzero()[:, 0]]
    for rows_of in groups:
        if rows_of.numel() == 0:
            continue
        alive = (~dead[rows_of[0]]).nonzero()[:, 0]
        x, y = a[rows_of][:, alive], b[rows_of][:, alive]
        one = torch.ones(len(rows_of), dtype=torch.float64)
        loss[rows_of], _ = reference.loss(x, y, None, **options)
        da, db = reference.gradient(x, y, one, gradient="full", **options)
        slope[rows_of] = (da.abs().sum(-1) + db.abs().sum(-1)) / inv_temperature
        if gradient != "full":
            da, db = reference.gradient(x, y, one, gradient=gradient, **options)
        place = rows_of[:, None], alive[None]
        grad_a[place] = da
        grad_b[place] = torch.zeros_like(da) if db is None else db
        log_p, log_q = (x * inv_temperature).log_softmax(-1), (y * inv_temperature).log_softmax(-1)
        p, q = log_p.exp(), log_q.exp()
        weight[rows_of] = p.norm(dim=-1) + q.norm(dim=-1)
        reach[rows_of] = torch.maximum(x.abs(), y.abs()).amax(-1) * inv_temperature
        apart = (x - y) * inv_temperature
        change[rows_of] = apart.abs().amax(-1)
        top_a, top_b = (z.argmax(-1, keepdim=True) for z in (x, y))
        of_b, changed = apart.gather(-1, top_b), log_p - log_q
        offsets = torch.cat((of_b, apart.gather(-1, top_a) - of_b, changed.gather(-1, top_b)), -1)
        common[rows_of] = offsets.abs().amax(-1)
        parts = (p - q) * changed
        terms[rows_of] = parts.sum(-1) ** 2 / (parts**2).sum(-1).clamp(min=torch.finfo(torch.float64).tiny)
    alike = (a == b).all(-1) & ~undefined
    return Truth(loss, grad_a, grad_b, undefined, dead, alike, weight, slope, reach, change, common, terms)


def lay_pair(draw: Draw, a: Tensor, b: Tensor, dtype: torch.dtype, expand: bool = True) -> tuple[Held, Held]:
    """Both sides in layouts of their own."""
    return draw.lay(a, dtype, expand=expand), draw.lay(b, dtype, expand=expand)
