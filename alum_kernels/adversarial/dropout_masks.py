"""Dropout's masks of a step's clean pass, kept on CPUs for the passes that repeat it.

A pass that repeats another one's masks begins with the same state of the generator. On a CPU they would be drawn again
one element after another, which takes a tenth of a standard step (``docs/performance.md``). A draw is a function of the
generator's state: one that begins in a state that the clean pass drew in takes that mask, and leaves the generator as
that draw left it. So whatever else draws, as layers that are skipped at random, draws what it would have; what this
does not know draws as ever.

The clean pass's graph holds the masks too, so what is kept is held no longer than that. Of a segment that a backward
runs again, the graph holds none, and none is kept. They are looked for in ``torch.nn.functional.dropout``,
``scaled_dot_product_attention`` and ``multi_head_attention_forward``; dropout of other functions, or in compiled ones,
is drawn again.

Passes over some samples of a batch take those samples' rows of the masks of the whole batch. What else a model draws
may be something for each sample, of which these would not get the same in a smaller batch. So
:class:`DrawsDifferError` is raised where the clean pass draws more than masks and single numbers, and where a later one
draws anything else than the clean one did.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from alum_kernels.adversarial.model_state import device_of, recomputes_segments

DROPOUT, ATTENTION = nn.functional.dropout, nn.functional.scaled_dot_product_attention
ATTENTION_MODULE = nn.functional.multi_head_attention_forward
BERNOULLI = torch.ops.aten.bernoulli_.float

FEWEST_TOKENS = 256
"""Of a batch whose masks are kept. Looking at every call of a pass takes some time too, more than small masks do."""


class DrawsDifferError(RuntimeError):
    """Passes over some samples cannot repeat what a pass over all of them drew."""


def can_keep_masks(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether masks are kept in a step of ``model`` on ``inputs``: on a CPU, from a size on, but not

    - of compiled modules, which have their own draws;
    - of a model that recomputes segments.
    """
    if _tokens(inputs) < FEWEST_TOKENS or device_of(model).type != "cpu" or torch.compiler.is_compiling():
        return False
    compiled = any(
        module._compiled_call_impl is not None or "_orig_mod" in module._modules for module in model.modules()
    )
    return not compiled and not recomputes_segments(model)


class _Mask(NamedTuple):
    """What was drawn: zero where an element is dropped, and another number elsewhere."""

    noise: Tensor
    keep_probability: float
    scaled: bool  # that number is 1 / keep_probability
    after: Tensor  # state of the generator


class KeptMasks(TorchFunctionMode):
    """Masks of one step.

    Args:
        chosen: places of the samples that perturbed passes run on; None for all.
        samples: how many the clean pass runs on.
    """

    def __init__(self, chosen: Tensor | None = None, samples: int = 0) -> None:
        super().__init__()
        self._chosen, self._samples = chosen, samples
        self._masks: dict[bytes, _Mask] = {}
        self._known_to: bytes | None = None  # the clean pass drew masks and single numbers alone up to this state
        self._end: bytes | None = None  # state of the generator after the clean pass; None before

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Within the context, of the clean pass, masks are kept as they are drawn.

        Raises:
            DrawsDifferError: at the end, where perturbed passes are over some samples and something else was drawn.
        """
        self._known_to = _state()
        with self:
            yield
        self._end = _state()
        # on some CPUs one number seeds the draw of a whole tensor, so the state at the end of a perturbed pass would
        # not tell that the tensor was smaller there
        if self._selects and self._known_to != self._end:
            raise DrawsDifferError("the clean pass drew other things than masks, which may be of samples")

    @contextmanager
    def repeated(self) -> Iterator[None]:
        """Within the context, of a perturbed pass that begins as the clean one did, kept masks are taken.

        Raises:
            DrawsDifferError: from within or at the end, where the pass is over some samples and others than those
                masks would have to be drawn.
        """
        with self if self._masks else nullcontext():
            yield
        if self._selects and _state() != self._end:
            raise DrawsDifferError("the generator's state after the pass is not the clean pass's")

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # what is kept at one call would be part of the code of all
            return func(*args, **kwargs)
        if func is DROPOUT:
            return self._dropout(*args, **kwargs)
        if func is torch.rand:
            return self._rand(*args, **kwargs)
        if _has_dropout_inside(func, args, kwargs):
            # made anew: one that is held would hold this one, and the masks until cycles are collected
            with _InAttention(self._draw_in_place):
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    @property
    def _selects(self) -> bool:
        return self._chosen is not None and self._end is not None

    def _dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:  # noqa: A002
        if inplace or not training or not 0 < p < 1 or not _is_plain(input):
            return DROPOUT(input, p, training, inplace)
        keep = 1 - p
        before = _state()
        noise = self._taken(before, input.shape, keep, scaled=True)
        if noise is None:
            noise = torch.empty_like(input).bernoulli_(keep).div_(keep)
            self._keep(before, noise, keep, scaled=True)
        if noise.dtype != input.dtype:  # whose 1 / keep is rounded otherwise
            noise = torch.ne(noise, 0).to(input.dtype).div_(keep)
        return input * noise

    def _rand(self, *args: Any, **kwargs: Any) -> Tensor:
        """What ``torch.rand`` does; a single number, as of a layer that may be skipped, is no sample's."""
        before = _state()
        drawn = torch.rand(*args, **kwargs)
        if drawn.numel() == 1:
            self._know(before)
        return drawn

    def _draw_in_place(self, noise: Tensor, keep: float) -> Tensor:
        """What ``noise.bernoulli_(keep)`` does; whoever asked for it scales it in place."""
        before = _state()
        known = self._taken(before, noise.shape, keep, scaled=False)
        if known is not None:
            return torch.ne(known, 0, out=noise)
        noise.bernoulli_(keep)
        self._keep(before, noise, keep, scaled=False)
        return noise

    def _keep(self, before: bytes, noise: Tensor, keep: float, *, scaled: bool) -> None:
        held = torch.is_grad_enabled() and not _is_run_again()
        if self._end is None and held:
            self._masks[before] = _Mask(noise, keep, scaled, torch.default_generator.get_state())
            self._know(before)

    def _know(self, before: bytes) -> None:
        """Take note that what was drawn from this state on is known."""
        if self._end is None and before == self._known_to:
            self._known_to = _state()

    def _taken(self, before: bytes, shape: torch.Size, keep: float, *, scaled: bool) -> Tensor | None:
        """The mask that was drawn in this state, where one of this kind was; the draw is then done."""
        mask = self._masks.get(before)
        noise = None
        if mask is not None and (mask.keep_probability, mask.scaled) == (keep, scaled):
            noise = self._of_shape(mask.noise, shape)
        if self._selects and (noise is None or _is_run_again()):  # a backward would draw, and other masks than rows
            raise DrawsDifferError(f"no mask of shape {tuple(shape)} was drawn in this state of the generator")
        if noise is None:
            return None
        self._masks[before] = mask._replace(noise=noise)  # later passes are over the same samples
        torch.default_generator.set_state(mask.after)
        return noise

    def _of_shape(self, noise: Tensor, shape: torch.Size) -> Tensor | None:
        if noise.shape == shape:
            return noise
        of_samples = self._chosen is not None and noise.dim() > 0 and noise.shape[0] == self._samples
        if of_samples and shape == (len(self._chosen), *noise.shape[1:]):
            return noise.index_select(0, self._chosen)
        return None


class _InAttention(TorchDispatchMode):
    """Within the context, ``draw(noise, keep_probability)`` is called for ``noise.bernoulli_(keep_probability)``.

    Attention has its dropout inside, where only operators are seen.
    """

    def __init__(self, draw: Callable[[Tensor, float], Tensor]) -> None:
        super().__init__()
        self._draw = draw

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is BERNOULLI and len(args) == 2 and not kwargs and _is_plain(args[0]):
            return self._draw(*args)
        return func(*args, **(kwargs or {}))


def _has_dropout_inside(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    if func is ATTENTION:
        return (args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)) > 0
    return func is ATTENTION_MODULE and kwargs.get("training", True)


def _tokens(inputs: Mapping[str, Any]) -> int:
    ids, embeds = (inputs.get(name) for name in ("input_ids", "inputs_embeds"))
    if isinstance(ids, Tensor):
        return ids.numel()
    return embeds[..., 0].numel() if isinstance(embeds, Tensor) else 0


def _state() -> bytes:
    return torch.default_generator.get_state().numpy().tobytes()


def _is_plain(tensor: Tensor) -> bool:
    """Whether it draws from the CPU's generator, by itself: not for those that stand for several, of ``vmap``, say."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.device.type == "cpu"
        and not tensor.is_nested
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def _is_run_again() -> bool:
    """Whether what a backward needs is not held as it is, as in a checkpointed segment, which is run again."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
