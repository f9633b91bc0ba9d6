"""Masks of passes over some samples: their rows of the clean pass's, or else drawn in two parts of it."""

import pytest
import tiny_models
import torch
from test_dropout_masks import FRACTION, MOVED, assert_same, drawn_again, one_step, small_batches_too
from test_sub_batch import CASES, SAMPLES, batch_of, by_content, choice_of, choices_of, config_of, mean_over_choices
from tiny_models import Gradients
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from alum_kernels import AdversarialObjective
from alum_kernels.adversarial import run
from alum_kernels.adversarial.dropout_masks import DrawsDifferError, KeptMasks

__all__ = ["by_content", "small_batches_too"]


@pytest.mark.parametrize("chosen", [1, 2, 3])
@pytest.mark.parametrize(("task", "fused"), CASES)
def test_with_dropout_too_the_mean_over_all_choices_is_the_whole_batch(task, fused, chosen, by_content):
    """The clean pass draws for the whole batch, whatever is chosen: so each sample has its masks in all of them.

    Multiple choice has a row a choice, not a sample: its clean pass runs in two parts.
    """
    if task == "choice":
        pytest.skip("its masks have other rows than samples")
    model = tiny_models.make("bert", task, 0.2, torch.float64)
    batch, config = batch_of(task), config_of(fused)

    def seeded(*_) -> None:
        torch.manual_seed(5)

    handle = model.register_forward_pre_hook(seeded)  # whose state each pass restores, as it was before the first
    torch.manual_seed(5)
    objective = AdversarialObjective(model, config)
    model.zero_grad()
    figures = objective.backward(batch)
    objective.remove_hooks()
    whole = figures["task_loss"], figures["divergence"], Gradients.of(model).flat()
    assert whole[1] > 1e-5
    parts = mean_over_choices(model, batch, config, choices_of(chosen), by_content)
    handle.remove()
    for name, found, wanted in zip(("task loss", "divergence", "gradient"), parts, whole, strict=True):
        assert float((found - wanted).norm() / wanted.norm()) < 1e-10, name


class Noisy(nn.Module):
    """Adds something at random to a hidden state."""

    def __init__(self, draw) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, hidden: Tensor) -> Tensor:
        return self.draw(hidden) if self.training else hidden


def time_first(hidden: Tensor) -> Tensor:
    return functional.dropout(hidden.transpose(0, 1), 0.3).transpose(0, 1)


def of_features(hidden: Tensor) -> Tensor:
    return hidden * functional.dropout(torch.ones(hidden.shape[-1], dtype=hidden.dtype), 0.3)


def layer_drop(hidden: Tensor) -> Tensor:
    return hidden if torch.rand([]) < 0.5 else 0.5 * hidden


def seeded_by_one_number(hidden: Tensor) -> Tensor:
    """As some CPUs draw: the default generator's state does not tell how much was drawn."""
    generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    return hidden + 0.1 * torch.randn(hidden.shape, generator=generator, dtype=hidden.dtype)


def each_for_itself(hidden: Tensor) -> Tensor:
    return torch.vmap(lambda row: functional.dropout(row, 0.3), randomness="different")(hidden)


def last(draw):
    """A model whose very last draw is this one."""

    def model() -> nn.Module:
        inner = tiny_models.bert(0.2).double()
        inner.dropout = nn.Sequential(inner.dropout, Noisy(draw))
        return inner

    return model


OTHERS = {
    "noise": (lambda x: x + 0.1 * torch.randn_like(x), False),
    "uniform": (lambda x: x + 0.1 * torch.rand_like(x), False),
    "in place": (lambda x: functional.dropout(x.clone(), 0.3, True, True), False),
    "channels": (lambda x: functional.dropout1d(x.unsqueeze(-1), 0.3).squeeze(-1), False),
    "seeded": (seeded_by_one_number, False),
    "vmap": (each_for_itself, False),
    "of features": (of_features, True),
    "layer drop": (layer_drop, True),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_else_a_model_draws_is_repeated_too_if_need_be_in_two_parts(name):
    """A step that cannot take rows of what was drawn begins again, and the next ones know."""
    draw, selects = OTHERS[name]
    model, batch = last(draw)(), tiny_models.classification_batch(8)
    objective = AdversarialObjective(model, FRACTION)
    calls = []
    model.register_forward_hook(lambda module, args, output: calls.append(1))
    for _ in range(2):
        torch.manual_seed(5)
        output = objective(**batch)
        assert output.divergence < 1e-20  # the same to rounding, if everything was repeated
        assert objective._runner.selects_masks == selects
    passes = 3 if selects else 4  # clean, ascent, final; the clean one in two parts
    assert len(calls) == 2 * passes + (0 if selects else 1)  # the first try: a clean pass
    state = objective.state_dict()
    other = AdversarialObjective(last(draw)(), FRACTION)
    other.load_state_dict(state)
    assert other._runner.selects_masks == selects


def test_masks_with_another_order_of_dimensions_are_drawn_in_two_parts():
    model, batch = tiny_models.bert(0.2).double(), tiny_models.classification_batch(8)
    model.bert.embeddings.dropout = Noisy(time_first)
    objective = AdversarialObjective(model, FRACTION)
    assert objective(**batch).divergence < 1e-20
    assert not objective._runner.selects_masks


def with_a_checkpointed_layer() -> nn.Module:
    model = tiny_models.bert(0.2)
    layer = model.bert.encoder.layer[0]
    inside = layer.forward
    layer.forward = lambda *args, **kwargs: checkpoint(inside, *args, **kwargs, use_reentrant=False)
    return model


@pytest.mark.parametrize("fraction", [1.0, 0.25])
def test_masks_in_segments_that_a_backward_runs_again_are_drawn_again(fraction, monkeypatch):
    """It draws them for the samples of its pass: rows of the whole batch's would have been other masks."""
    model, batch = with_a_checkpointed_layer(), tiny_models.classification_batch(8)
    config = MOVED.replace(adversarial_fraction=fraction, steps=2)
    kept = []
    keep = KeptMasks._keep

    def watch(self, before, noise, *args, **options) -> None:
        keep(self, before, noise, *args, **options)
        kept.append(before in self._masks)

    monkeypatch.setattr(KeptMasks, "_keep", watch)
    objective = AdversarialObjective(model, config)
    found = one_step(objective, batch)
    assert kept[:7] == [True, False, False, False, True, True, True]  # the embeddings', two layers', the head's
    assert objective._runner.selects_masks == (fraction == 1.0)
    objective.remove_hooks()
    drawn_again(monkeypatch)
    assert_same(found, one_step(AdversarialObjective(model, config), batch))


@pytest.mark.parametrize("fraction", [1.0, 0.25])
def test_masks_in_compiled_functions_are_drawn_again(fraction, monkeypatch):
    """Functions, which no look at the model's modules finds."""
    compiled = torch.compile(lambda x: functional.dropout(x, 0.3).tanh(), backend="aot_eager", fullgraph=True)
    model, batch = last(compiled)().float(), tiny_models.classification_batch(8)
    config = MOVED.replace(adversarial_fraction=fraction)
    objective = AdversarialObjective(model, config)
    try:
        found = one_step(objective, batch)
        assert objective._runner.selects_masks == (fraction == 1.0)
        objective.remove_hooks()
        drawn_again(monkeypatch)
        again = one_step(AdversarialObjective(model, config), batch)
    finally:
        torch.compiler.reset()
    assert_same(found, again)


def test_without_dropout_nothing_is_looked_at_and_parts_are_selected():
    model, batch = tiny_models.bert(0.0).double(), tiny_models.classification_batch(8)
    objective = AdversarialObjective(model, FRACTION.replace(std=0.05))
    rows = []
    model.register_forward_hook(lambda module, args, output: rows.append(len(output.logits)))
    assert objective(**batch).divergence > 0
    assert rows == [8, 2, 2]


def test_a_still_part_of_a_masked_lm_is_still():
    model, batch = tiny_models.bert_masked_lm(0.2).double(), tiny_models.masked_lm_batch(8)
    objective, rows = AdversarialObjective(model, FRACTION), []
    assert objective(**batch).divergence < 1e-20  # the first step looks for a linear head, by passes of its own
    model.bert.register_forward_hook(lambda module, args, output: rows.append(len(output.last_hidden_state)))
    assert objective(**batch).divergence < 1e-20
    assert objective.linear_head is not None
    assert rows == [8, 2, 2]


def test_a_pass_over_some_samples_says_what_it_cannot_repeat():
    x = torch.ones(8, 3)
    masks = KeptMasks(torch.tensor([1, 4]), 8)
    torch.manual_seed(2)
    with masks.kept():
        whole = functional.dropout(x, 0.5)
    for call, message in (
        (lambda: functional.dropout(torch.ones(2, 4), 0.5), r"^no mask of shape \(2, 4\) was drawn"),
        (lambda: functional.dropout(x[:2], 0.25), r"^no mask of shape \(2, 3\) was drawn"),
        (lambda: torch.rand(2), r"^the generator's state after the pass"),
        (lambda: functional.dropout(x[:2], 0.5) + torch.rand(1), r"^the generator's state after the pass"),
    ):
        torch.manual_seed(2)
        with pytest.raises(DrawsDifferError, match=message), masks.repeated():
            call()
    torch.manual_seed(2)
    with pytest.raises(DrawsDifferError, match=r"^no mask"), masks.repeated():
        checkpoint(lambda: functional.dropout(x[:2], 0.5), use_reentrant=False)
    other = KeptMasks(torch.tensor([1, 4]), 8)
    with pytest.raises(DrawsDifferError, match=r"^the clean pass drew other things"), other.kept():
        torch.rand(2)
    torch.manual_seed(2)
    with masks.repeated():
        assert torch.equal(functional.dropout(x[:2], 0.5), whole[[1, 4]])


def test_every_choice_of_a_seed_draws_the_same_clean_pass(by_content):
    """In two parts, what a sample is given would depend on what is chosen."""
    model, batch = tiny_models.bert(0.2), tiny_models.classification_batch(SAMPLES)
    losses = set()
    for indices in ([0], [3]):
        by_content.setattr(run, "choose", lambda *_, indices=indices: choice_of(indices))
        torch.manual_seed(5)
        losses.add(float(AdversarialObjective(model, FRACTION)(**batch).task_loss.detach()))
    assert len(losses) == 1
