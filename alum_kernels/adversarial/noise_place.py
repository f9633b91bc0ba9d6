"""Seed and place of the batches that make one optimizer step, accumulated and over processes."""

from typing import Protocol

from torch import Tensor

from alum_kernels.ops.checks import check_count


class DrawsSeeds(Protocol):
    """An objective, or whatever else draws one seed a step."""

    def draw_seed(self) -> Tensor:
        """The next seed, a one-element int64 tensor."""


class NoisePlace:
    """Where a batch lies in the whole batch of its optimizer step, and the seed that the step's batches share.

    The noise of a sample is a function of that seed and that place. So neither accumulation over micro-batches nor the
    number of processes changes it. The batches that processes take at the same time have as many samples each.

    Args:
        objective: draws one seed an optimizer step, when the step's first batch comes.
        process: index of this process.
        processes: how many there are.

    Raises:
        TypeError, ValueError: no such process.

    Example:
        >>> import torch
        >>> from alum_kernels import NoisePlace
        >>> class Seeds:
        ...     drawn = 0
        ...     def draw_seed(self):
        ...         self.drawn += 1
        ...         return torch.tensor([self.drawn])
        >>> place = NoisePlace(Seeds(), process=1, processes=2)
        >>> for step in (0, 0, 1):  # two micro-batches of four samples, then the next optimizer step
        ...     seed, sample_offset = place.next(4, step)
        ...     print(seed.item(), sample_offset)
        1 4
        1 12
        2 4
    """

    def __init__(self, objective: DrawsSeeds, process: int = 0, processes: int = 1) -> None:
        check_count("processes", processes, least=1)
        check_count("process", process)
        if process >= processes:
            raise ValueError(f"process: expected less than processes {processes}, got {process}")
        self._objective, self._process, self._processes = objective, process, processes
        self._step: int | None = None
        self.begin()

    def begin(self) -> None:
        """The next batch is the first of an optimizer step."""
        self._seed: Tensor | None = None
        self._samples = 0

    def next(self, samples: int, step: int | None = None) -> tuple[Tensor, int]:
        """Seed and ``sample_offset`` of the next batch, as :meth:`AdversarialObjective.forward` takes them.

        Args:
            samples: in this process's batch.
            step: number of the optimizer step, where there is one: another than before begins a new step. Without it,
                :meth:`begin` does.
        """
        if step is not None and step != self._step:
            self._step = step
            self.begin()
        if self._seed is None:
            self._seed = self._objective.draw_seed()
        sample_offset = self._samples + self._process * samples
        self._samples += self._processes * samples
        return self._seed, sample_offset
