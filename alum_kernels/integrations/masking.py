"""Masked-LM collation whose masked share grows with training: the progressive masking of ALUM's pre-training.

Which positions are chosen and what replaces them is the work of transformers' ``DataCollatorForLanguageModeling``. Here
are the share as a function of progress, the way of that progress into the worker processes of a ``DataLoader``, and
draws that depend on a batch and not on who collates it.
"""

import hashlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

try:
    from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase, TrainerCallback
except ImportError as error:
    raise ImportError(
        "alum_kernels.integrations.masking: expected transformers to be installed; "
        "pip install 'alum-kernels[transformers]'"
    ) from error

ALUM_SHARES = (0.05, 0.10, 0.15, 0.20, 0.25)
"""Masked share in each fifth of ALUM's pre-training."""

STEP, TOTAL, EPOCH = range(3)
"""Places in the tensor of the progress."""


class ProgressiveMaskingCollator(DataCollatorForLanguageModeling):
    """Pads a batch and masks a share of its tokens that follows the progress of training.

    With n shares, step ``step`` of ``total`` has ``shares[step * n // total]``, and from ``total`` on the last one. The
    progress comes from :class:`MaskingProgressCallback` or :meth:`set_progress`. It lies in shared memory, so that the
    worker processes of a ``DataLoader`` see it, forked or spawned, persistent or not.

    A batch has the share of the moment at which it is collated, and loaders collate ahead: the Trainer by one
    micro-batch, and ``num_workers * prefetch_factor`` more with workers. By so much a share begins late.

    Two ways to draw the masks:

    - With a ``seed``, they are a function of the seed, the epoch, the share and the tokens of the padded batch.
      Workers, prefetching, resuming and what else draws random numbers do not change them. A batch that comes twice in
      an epoch has the same masks twice.
    - Without one, they come from the process's own generator (torch's; numpy's for ``return_tensors="np"``). A Trainer
      resumed at the beginning of an epoch draws them as an uninterrupted one does. Resumed within an epoch it does not:
      it restores the generator when the first batches have been collated already.

    Either way, a run resumed from a checkpoint has the shares of an uninterrupted one, but for the batches that the
    latter had collated before the checkpoint: should a share begin there, only the resumed run has it on time. With
    workers, when within that lead a batch is collated is a matter of chance, and so is its share where two shares meet.

    The Trainer evaluates with the same collator, hence at the present share.

    Args:
        tokenizer: pads, and knows the special tokens, which are never chosen. (Ids that it counts among them are
            recognised wherever they stand, so unknown words are not chosen either, unless the samples carry a
            ``special_tokens_mask``.)
        shares: share of the other tokens that is to be predicted, in equal parts of the training, each in (0, 1].
        mask_replace_prob: share of the chosen tokens that becomes the mask token.
        random_replace_prob: share of them that becomes a token drawn from the whole vocabulary; the rest stays.
        pad_to_multiple_of: of the padded length, if given.
        return_tensors: "pt" or "np".
        seed: of the masks, see above.

    Returns:
        Called with a list of B samples, a batch of the samples' own fields, padded to the longest (S tokens):
        ``input_ids`` with the replacements and ``labels``, both (B, S), the latter -100 wherever nothing is to be
        predicted; all other fields, such as ``token_type_ids`` and ``next_sentence_label``, untouched.

    Raises:
        TypeError: ``shares`` is no sequence of numbers, or ``seed`` no integer.
        ValueError: a share outside (0, 1], or none; a tokenizer without a mask token; replacements of more than all.
            When called: an empty batch.

    Source:
        Liu et al. 2020, arXiv:2004.08994 (the share rises from 5 % to 25 %, by 5 points after every fifth of the
        training); Devlin et al. 2019, arXiv:1810.04805, section 3.1 (80 % mask token, 10 % random, 10 % unchanged).

    Example:
        >>> import transformers
        >>> from alum_kernels.integrations.masking import ProgressiveMaskingCollator
        >>> words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
        >>> tokenizer = transformers.BertTokenizer(vocab={word: place for place, word in enumerate(words)})
        >>> collate = ProgressiveMaskingCollator(tokenizer, seed=0)
        >>> samples = [tokenizer("a b c d e f g h " * 32) for _ in range(64)]
        >>> for step in (0, 50, 99):
        ...     collate.set_progress(step, 100)
        ...     chosen = collate(samples)["labels"].ne(-100).float().mean().item()
        ...     print(f"{collate.share:.2f} {abs(chosen - collate.share) < 0.02}")
        0.05 True
        0.15 True
        0.25 True
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        shares: Sequence[float] = ALUM_SHARES,
        *,
        mask_replace_prob: float = 0.8,
        random_replace_prob: float = 0.1,
        pad_to_multiple_of: int | None = None,
        return_tensors: str = "pt",
        seed: int | None = None,
    ) -> None:
        self.shares = _checked_shares(shares)
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
            raise TypeError(f"seed: expected an int or None, got {type(seed).__name__}")
        if return_tensors not in ("pt", "np"):
            raise ValueError(f"return_tensors: expected 'pt' or 'np', got {return_tensors!r}")
        super().__init__(
            tokenizer,
            mlm_probability=self.shares[0],
            mask_replace_prob=mask_replace_prob,
            random_replace_prob=random_replace_prob,
            pad_to_multiple_of=pad_to_multiple_of,
            return_tensors=return_tensors,
            seed=seed,
        )
        self._progress = torch.zeros(3, dtype=torch.int64).share_memory_()  # STEP, TOTAL, EPOCH

    @property
    def share(self) -> float:
        """The masked share at the present progress."""
        step, total, _ = self._progress.tolist()
        parts = len(self.shares)
        return self.shares[min(step * parts // max(total, 1), parts - 1)]

    def set_progress(self, step: int, total: int, epoch: int = 0) -> None:
        """States where training is, for all processes that hold this collator.

        Args:
            step: optimizer steps done, from 0.
            total: optimizer steps of the whole training.
            epoch: passes over the data that are done; with a ``seed``, masks change with it.

        Raises:
            TypeError: one that is no integer.
            ValueError: a negative ``step`` or ``epoch``, or a ``total`` below 1.
        """
        self._store(step, total, epoch, least_total=1)

    def state_dict(self) -> dict[str, int]:
        """The progress, for a checkpoint of a loop of one's own."""
        step, total, epoch = self._progress.tolist()
        return {"step": step, "total": total, "epoch": epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Takes the progress of :meth:`state_dict` up again.

        Args:
            state: what that gave.

        Raises:
            TypeError, ValueError: no such progress.
        """
        if not {"step", "total", "epoch"} <= state.keys():
            raise ValueError(f"state: expected 'step', 'total' and 'epoch', got {', '.join(state) or 'nothing'}")
        self._store(state["step"], state["total"], state["epoch"], least_total=0)

    def _store(self, step: int, total: int, epoch: int, *, least_total: int) -> None:
        # a total of 0 is that of a collator which has not been told yet
        for name, value, least in (("step", step, 0), ("total", total, least_total), ("epoch", epoch, 0)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        self._progress[TOTAL] = total
        self._progress[EPOCH] = epoch
        self._progress[STEP] = step

    def __call__(self, features: Sequence[Any], return_tensors: str | None = None) -> dict[str, Any]:
        """Pads and masks the samples ``features``: dicts as tokenizers give them, or lists of ids."""
        if not features:
            raise ValueError("features: expected at least one sample, got an empty batch")
        return super().__call__(features, return_tensors)

    def torch_mask_tokens(
        self, inputs: Tensor, special_tokens_mask: Any = None, offset_mapping: Any = None
    ) -> tuple[Tensor, Tensor]:
        """The parent's, with the present share."""
        self._prepare_draws(inputs.numpy(), lambda seed: torch.Generator().manual_seed(seed))
        return super().torch_mask_tokens(inputs, special_tokens_mask, offset_mapping)

    def numpy_mask_tokens(
        self, inputs: np.ndarray, special_tokens_mask: Any = None, offset_mapping: Any = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The parent's, with the present share."""
        self._prepare_draws(inputs, np.random.default_rng)
        return super().numpy_mask_tokens(inputs, special_tokens_mask, offset_mapping)

    def create_rng(self, *_: Any) -> None:
        """Nothing: the parent's generator of a process would repeat its masks in every epoch of fresh workers."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._progress.share_memory_()  # copies are not, unless they were made for a worker process

    def _prepare_draws(self, inputs: np.ndarray, new_generator: Callable[[int], Any]) -> None:
        if self._progress[TOTAL] == 0 and len(self.shares) > 1:
            warnings.warn(
                f"the masked share stays {self.shares[0]:g}: give the Trainer a MaskingProgressCallback, "
                "or call set_progress",
                stacklevel=2,
            )
        self.mlm_probability = self.share
        if self.seed is not None:
            place = f"{self.seed} {self._progress[EPOCH].item()} {inputs.shape}".encode()
            digest = hashlib.blake2b(place + inputs.tobytes(), digest_size=8).digest()
            self.generator = new_generator(int.from_bytes(digest, "little"))


class MaskingProgressCallback(TrainerCallback):
    """Tells a :class:`ProgressiveMaskingCollator` where the Trainer is, also in a run resumed from a checkpoint.

    Args:
        collator: the ``data_collator`` of the Trainer.

    Raises:
        TypeError: ``collator`` is none of that class.

    Example:
        >>> import tempfile, transformers
        >>> from alum_kernels.integrations.masking import MaskingProgressCallback, ProgressiveMaskingCollator
        >>> words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
        >>> tokenizer = transformers.BertTokenizer(vocab={word: place for place, word in enumerate(words)})
        >>> config = transformers.BertConfig(
        ...     vocab_size=13, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        ... )
        >>> collate = ProgressiveMaskingCollator(tokenizer, seed=0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     trainer = transformers.Trainer(
        ...         transformers.BertForMaskedLM(config),
        ...         transformers.TrainingArguments(folder, max_steps=5, save_strategy="no", report_to="none"),
        ...         data_collator=collate,
        ...         train_dataset=[tokenizer("a b c d e f g h") for _ in range(8)],
        ...         callbacks=[MaskingProgressCallback(collate)],
        ...     )
        ...     trainer.train().global_step  # doctest: +ELLIPSIS
        {'train_runtime': ...}
        5
        >>> collate.state_dict()["step"], collate.share
        (5, 0.25)
    """

    def __init__(self, collator: ProgressiveMaskingCollator) -> None:
        if not isinstance(collator, ProgressiveMaskingCollator):
            raise TypeError(f"collator: expected a ProgressiveMaskingCollator, got {type(collator).__name__}")
        self.collator = collator

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._publish(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # on_step_begin is too late: the step's batches have been collated by then
        self._publish(state)

    def _publish(self, state: Any) -> None:
        self.collator.set_progress(state.global_step, max(state.max_steps, 1), int(state.epoch or 0))


def _checked_shares(shares: Sequence[float]) -> tuple[float, ...]:
    try:
        checked = tuple(float(share) for share in shares)
    except (TypeError, ValueError):
        raise TypeError(f"shares: expected a sequence of numbers, got {shares!r}") from None
    if not checked or not all(0 < share <= 1 for share in checked):
        raise ValueError(f"shares: expected one or more numbers in (0, 1], got {shares!r}")
    return checked
