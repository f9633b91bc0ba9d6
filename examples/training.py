"""A plain PyTorch training loop, for standard and adversarial training alike, and what it measured."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from alum_kernels import AdversarialConfig, AdversarialObjective
from alum_kernels.evaluation import LossIncrease, SmoothnessReport
from alum_kernels.training.batches import Batch, LabelledText, encode_texts, random_groups
from alum_kernels.training.blocks import HELD_OUT_SHARE, masked_blocks
from alum_kernels.training.learning_rate import linear_share
from alum_kernels.training.methods import adversarial_objective
from alum_kernels.training.optimizer import adamw

SAMPLE_KEY = "sample_index"
"""Entry of a training batch that says which examples it is of; the model does not see it."""

TELEMETRY_INTERVAL = 5
WARM_UP_SHARE = 0.1


@dataclass
class Run:
    """One training: its curves by step, and its figures on held-out text once it is evaluated."""

    task: str
    method: str
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    telemetry: list[dict[str, float]] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    loss_increase: LossIncrease | None = None
    smoothness: SmoothnessReport | None = None

    @property
    def seconds_per_step(self) -> float:
        """Median over the steps, without the first, which warms caches up."""
        ordered = sorted(self.seconds[1:] or self.seconds)
        return ordered[len(ordered) // 2]

    def mean_telemetry(self, name: str) -> float | None:
        values = [figures[name] for figures in self.telemetry if name in figures]
        return sum(values) / len(values) if values else None


def training_step(
    model: nn.Module, objective: AdversarialObjective | None, optimizer: torch.optim.Optimizer, batch: Batch
) -> Tensor:
    """One batch, from its forward pass to the changed parameters; the task's loss, detached."""

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    batch = dict(batch)
    samples = batch.pop(SAMPLE_KEY, None)
    if objective is None:
        loss = model(**batch).loss
        loss.backward()
    else:
        replays = objective.config.backward == "replay"
        kept = samples if objective.config.delta_lifetime > 1 else None
        loss = objective.backward(batch, update=update if replays else None, samples=kept)["task_loss"]
    update()
    return loss.detach()


def train(
    model: nn.Module,
    batches: Sequence[Batch],
    run: Run,
    config: AdversarialConfig | None,
    *,
    learning_rate: float,
    device: torch.device,
    keep_bar: bool = True,
) -> Run:
    """One pass over the batches with AdamW; ``config`` None is standard training. ``run`` is filled as it goes."""
    model.to(device).train()
    objective = adversarial_objective(model, config)
    optimizer = adamw(model, objective, learning_rate)
    warm_up = max(1, int(len(batches) * WARM_UP_SHARE))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: linear_share(step, len(batches), warm_up))
    try:
        with tqdm(
            batches, desc=f"{run.task}, {run.method}", unit="step", dynamic_ncols=True, leave=keep_bar
        ) as progress:
            for step, batch in enumerate(progress):
                placed = placed_on(device, batch)
                if objective is not None:
                    objective.set_progress(step, len(batches))
                started = _clock(device)
                loss = training_step(model, objective, optimizer, placed)
                run.seconds.append(_clock(device) - started)
                schedule.step()
                run.steps.append(step)
                run.losses.append(float(loss))
                if objective is not None and (step + 1) % TELEMETRY_INTERVAL == 0:
                    run.telemetry.append({"step": step, **objective.telemetry.read()})
                progress.set_postfix(loss=f"{run.losses[-1]:.3f}")
    finally:
        if objective is not None:
            objective.remove_hooks()
    return run


def placed_on(device: torch.device, batch: Batch) -> Batch:
    """A batch on the device; its samples' identifiers stay on the host."""
    return {name: tensor if name == SAMPLE_KEY else tensor.to(device) for name, tensor in batch.items()}


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def classification_batches(
    tokenizer,
    texts: LabelledText,
    *,
    size: int,
    length: int,
    generator: torch.Generator | None = None,
    lengths: Sequence[int] | None = None,
    indexed: bool = False,
) -> Iterator[Batch]:
    """Padded batches of :func:`ordered_batches`; labels are classes or scores, ``indexed`` adds ``SAMPLE_KEY``."""

    def encode(chosen: list[int]) -> Batch:
        index = {SAMPLE_KEY: torch.tensor(chosen)} if indexed else {}
        return {**encode_texts(tokenizer, texts, chosen, length), **index}

    return ordered_batches(len(texts), encode, size=size, generator=generator, lengths=lengths)


def ordered_batches(
    count: int,
    encode: Callable[[list[int]], Batch],
    *,
    size: int,
    generator: torch.Generator | None = None,
    lengths: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Encoded groups of ``size`` out of ``count`` examples, in order or endlessly in the random order of ``generator``.

    A last group that is smaller is left out of random orders; ``lengths`` are of :func:`random_groups`.
    """
    while True:
        if generator is None:
            groups = list(torch.arange(count).split(size))
        else:
            groups = random_groups(count, size, generator, lengths)
        for chosen in groups:
            if generator is None or len(chosen) == size:
                yield encode(chosen.tolist())
        if generator is None or count < size:
            return


def take(batches: Iterable[Batch], count: int) -> list[Batch]:
    return list(islice(batches, count))


def masked_lm_batches(
    tokenizer, paragraphs: Sequence[str], *, size: int, length: int, seed: int, steps: int | None = None
) -> tuple[list[Batch], list[Batch]]:
    """Batches of blocks of ``length`` tokens: for training, and a tenth held out.

    The share of the tokens that is to be predicted rises as in ALUM's pre-training, over ``steps`` batches (all, if not
    given), and is 15 % in held-out text.
    """
    from alum_kernels.integrations.masking import ProgressiveMaskingCollator

    blocks = masked_blocks(tokenizer, paragraphs, length)
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed)).tolist()
    samples = [
        [{"input_ids": blocks[index]} for index in order[start : start + size]]
        for start in range(0, len(order) - size + 1, size)
    ]
    held_out = max(1, len(samples) // 10)
    collate = ProgressiveMaskingCollator(tokenizer, seed=seed)
    collate_held_out = ProgressiveMaskingCollator(tokenizer, (HELD_OUT_SHARE,), seed=seed)
    batches = []
    for step, rows in enumerate(samples[held_out:]):
        collate.set_progress(step, steps or len(samples) - held_out)
        batches.append(dict(collate(rows)))
    return batches, [dict(collate_held_out(rows)) for rows in samples[:held_out]]
