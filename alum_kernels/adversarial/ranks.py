"""What the means of one rank weigh in those of the batch of all ranks.

    mean over all = (1 / W) sum over ranks of w mean_r          w = W n_r / n: n_r of the n rows, or labels, are theirs

``DistributedDataParallel`` and ``fully_shard`` average the gradients of W ranks, so a rank whose means are taken w
times has its part of the gradient of the whole batch. The counts of a step are summed in one all-reduce of a few
integers, for which the host waits on no device. A rank without a label weighs 0, and takes part in every collective
like the others.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from alum_kernels.adversarial.heads import Head
from alum_kernels.adversarial.passes import TaskPass
from alum_kernels.adversarial.row_losses import label_count, label_sum, own_targets, part_weight, weighted_mean
from alum_kernels.adversarial.samples import sample_count


class RankWeights:
    """w of each mean of one step.

    Args:
        head: what the model predicts, None where that is not known.
        batch: arguments of the model, labels included.
        ranks: W.
        task: (parts,) of the task's loss: of each part where a head has several with different counts, else one.
        rows: (heads,) of the divergences.
        samples: 0-d, of means over the samples' labels.
    """

    def __init__(
        self, head: Head | None, batch: Mapping[str, Any], ranks: int, task: Tensor, rows: Tensor, samples: Tensor
    ) -> None:
        self._head, self._batch = head, batch
        self.ranks, self.samples, self._task, self._rows = ranks, samples, task, rows

    def of_task(self, task: TaskPass) -> TaskPass:
        """A pass over the whole batch of this rank, with what is differentiated weighted."""
        if self._task.shape[0] == 1:
            loss = weighted_mean(task.loss, self._task[0])
        else:
            means = task.part_losses or self._part_means(task.outputs)
            parts = [weighted_mean(mean, weight) for mean, weight in zip(means, self._task, strict=True)]
            loss = part_weight(self._head) * sum(parts)
        rows = self._rows.to(loss.dtype)
        shares = rows if task.shares is None else task.shares * rows
        return task._replace(loss=loss, shares=shares)

    def _part_means(self, outputs: Any) -> list[Tensor]:
        """Mean cross-entropy of each part, as the models' own losses take it."""
        sums = [label_sum(part, outputs, self._batch) for part in self._head.parts]
        return [total / count.clamp(min=1) for total, count in sums]


class RankCounts:
    """Counts the labels and rows of each step over a process group.

    Args:
        group: of all ranks whose gradients are averaged.
        head: what the model predicts; without one, samples are counted.
        positions: ``"labelled"`` or ``"all"`` are compared.
        compares: whether predictions are compared.
    """

    def __init__(self, group: "distributed.ProcessGroup", head: Head | None, positions: str, *, compares: bool) -> None:
        self.group, self.ranks = group, distributed.get_world_size(group)
        self._head, self._positions, self._compares = head, positions, compares

    def weights(self, batch: Mapping[str, Any], device: torch.device) -> RankWeights:
        """The weights of this rank's batch; every rank of the group must call it in the same step.

        Raises:
            ValueError: the batch lacks labels, or has a count of its own.
        """
        if batch.get("num_items_in_batch") is not None:
            raise ValueError(
                "batch: expected no 'num_items_in_batch' with a process_group, which counts the labels itself"
            )
        task, rows, samples = self._counts(batch)
        own = _as_tensor([*task, *rows, samples], device)
        total = own.clone()
        distributed.all_reduce(total, group=self.group)
        weights = self.ranks * own.double() / total.clamp(min=1)
        of_task, of_rows, of_samples = weights.split([len(task), len(rows), 1])
        return RankWeights(self._head, batch, self.ranks, of_task, of_rows, of_samples[0])

    def _counts(self, batch: Mapping[str, Any]) -> tuple[list[Tensor | int], list[Tensor | int], Tensor | int]:
        head = self._head
        if head is None:
            samples = sample_count(batch)
            return [samples], [], samples
        samples = label_count(head, batch)
        rows = [part.row_count(batch, self._positions) for part in head.parts] if self._compares else []
        if len(head.parts) == 1:
            return [samples], rows, samples
        return [_own_count(part, batch) for part in head.parts], rows, samples


def _own_count(part: Head, batch: Mapping[str, Any]) -> Tensor:
    """Over how many labels the models' own loss of one part is a mean."""
    sequences = next((batch[key] for key in ("input_ids", "inputs_embeds") if batch.get(key) is not None), None)
    targets, ignored = own_targets(part, batch, 0 if sequences is None else sequences.shape[1])
    return (targets != ignored).sum()


def _as_tensor(counts: Sequence[Tensor | int], device: torch.device) -> Tensor:
    """(n,) int64; what is known on the host is filled in, not copied, which would wait."""
    return torch.stack(
        [
            count.to(torch.int64) if isinstance(count, Tensor) else torch.full((), count, device=device)
            for count in counts
        ]
    )
