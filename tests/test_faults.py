"""What is not finite stays visible: no NaN becomes a loss of 0, and a row that is spoilt spoils no other."""

import math
import warnings

import pytest
import tiny_models
import torch
from tiny_trainer import CLASSIFICATION, MOVED, trainer_of
from torch import Tensor, nn
from transformers import TrainerCallback

from alum_kernels import (
    AdversarialConfig,
    AdversarialObjective,
    FiniteGuard,
    NonFiniteError,
    kl,
    squared_error,
    symmetric_kl,
)
from alum_kernels.adversarial.config import PRESETS
from alum_kernels.adversarial.telemetry import Telemetry
from alum_kernels.evaluation.robustness import accuracy_under_attack

NAN, INF = float("nan"), float("inf")
SPOILT = 1
"""The row that is spoilt."""

SEED = torch.tensor([5])


def spoil(module: nn.Module, row: int = SPOILT, value: float = NAN, position: int | None = None):
    """From here on one row of a module's output, or one position of it, is multiplied by ``value``."""

    def hook(_, args, output):
        tensor = output[0] if isinstance(output, tuple) else output
        if tensor.shape[0] <= row:  # a sample that shows what the head is
            return None
        factor = torch.ones_like(tensor)
        factor[row if position is None else (row, position)] = value
        spoilt = tensor * factor
        return (spoilt, *output[1:]) if isinstance(output, tuple) else spoilt

    return module.register_forward_hook(hook)


def refuses(guard: FiniteGuard, model: nn.Module) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return not guard.allows(model)


def stepped(model: nn.Module, config: AdversarialConfig, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict]:
    """The figures of a step, and its telemetry."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of heads that are not fused
        objective = AdversarialObjective(model, config)
        if config.proximal:
            objective.follow(torch.optim.SGD(model.parameters(), lr=0.1))
        update = (lambda: None) if config.backward == "replay" else None
        figures = objective.backward(batch, update=update)
    return figures, objective.telemetry.read()


# activations and logits

METHODS = {name: getattr(AdversarialConfig, name)() for name in PRESETS} | {
    "low memory": AdversarialConfig.smart(memory="low"),
    "depth": AdversarialConfig.smart(ascent_depth=1),
    "a part of the batch": AdversarialConfig.smart(adversarial_fraction=0.75, dropout="off"),
    "a teacher": AdversarialConfig.smart(proximal=1.0),
    "relative sizes": AdversarialConfig.smart(units="rms"),
    "room for labels": AdversarialConfig.smart(labelled_capacity=0.6),
    "all positions": AdversarialConfig.smart(positions="all"),
    "logits": AdversarialConfig.smart(fused_head=False),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", ["classification", "masked_lm"])
def test_a_spoilt_row_spoils_the_loss_of_every_method(method, task):
    config = METHODS[method]
    if task == "classification":
        model, batch = tiny_models.bert(), tiny_models.classification_batch()
    else:
        model, batch = tiny_models.bert_masked_lm(), tiny_models.masked_lm_batch()
    figures, _ = stepped(model, config, batch)
    assert all(value.isfinite() for value in figures.values())
    model.zero_grad()
    spoil(model.bert.encoder.layer[-1])
    figures, telemetry = stepped(model, config, batch)
    assert figures["loss"].isnan()
    assert figures["task_loss"].isnan()
    if config.alpha and method != "a part of the batch":
        assert figures["divergence"].isnan()
        assert math.isnan(telemetry["divergence"])
    assert any(parameter.grad is not None and not parameter.grad.isfinite().all() for parameter in model.parameters())
    guard = FiniteGuard()
    assert refuses(guard, model)


def test_a_spoilt_row_in_one_of_many_chunks(monkeypatch):
    monkeypatch.setenv("ALUM_LINEAR_CHUNK_BYTES", "200")  # a row of logits, or less
    model, batch = tiny_models.bert_masked_lm(), tiny_models.masked_lm_batch()
    spoil(model.bert.encoder.layer[-1])
    figures, _ = stepped(model, MOVED, batch)
    assert all(value.isnan() for value in figures.values())
    assert refuses(FiniteGuard(), model)


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("place", ["embeddings", "classifier", "parameter"])
def test_wherever_it_comes_from(place, value):
    model, batch = tiny_models.bert(), tiny_models.classification_batch()
    if place == "parameter":
        with torch.no_grad():
            model.bert.encoder.layer[0].intermediate.dense.bias[2] = value
    else:
        spoil(model.bert.embeddings if place == "embeddings" else model.classifier, value=value)
    figures, telemetry = stepped(model, MOVED, batch)
    assert not figures["loss"].isfinite()
    assert not figures["divergence"].isfinite()
    assert math.isnan(telemetry["ascent_gain"])
    guard = FiniteGuard(patience=1)
    guard.watch(figures)
    named = r".*parameters bert\.encoder\.layer\.0\.intermediate\.dense\.bias \(1 of" if place == "parameter" else ""
    with pytest.raises(NonFiniteError, match=rf"loss (nan|inf).*divergence (nan|inf).*gradients .*{named}"):
        guard.allows(model)


def test_inputs_that_are_not_finite_are_named():
    model = tiny_models.bert()
    batch = tiny_models.classification_batch()
    embeds = model.get_input_embeddings()(batch.pop("input_ids")).detach()
    embeds[SPOILT, 0, 0] = INF
    batch["inputs_embeds"] = embeds
    figures, _ = stepped(model, MOVED.replace(modules=("bert.embeddings",)), batch)
    assert figures["loss"].isnan()
    guard = FiniteGuard(patience=1)
    guard.watch(figures, batch)
    with pytest.raises(NonFiniteError, match=r"inputs inputs_embeds \(1 of 1\)"):
        guard.allows(model)


def test_a_gain_that_is_not_finite_is_shown():
    telemetry = Telemetry()
    telemetry.add(start=torch.tensor(NAN), end=torch.tensor(1.0))
    assert math.isnan(telemetry.read()["ascent_gain"])
    telemetry.add(start=torch.tensor(0.0), end=torch.tensor(1.0))
    assert "ascent_gain" not in telemetry.read()


# rows that do not count


@pytest.mark.parametrize("op", [symmetric_kl, kl])
@pytest.mark.parametrize("columns", [3, 300])
def test_a_masked_row_may_hold_anything_and_no_other(place, op, columns):
    torch.manual_seed(0)
    adv, clean = (torch.randn(4, columns, device=place.device) for _ in range(2))
    mask = torch.tensor([True, False, True, True], device=place.device)

    def result(adv: Tensor, clean: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
        sides = adv.clone().requires_grad_(), clean.clone().requires_grad_()
        loss = op(*sides, mask=mask, backend=place.backend)
        return loss.detach(), *torch.autograd.grad(loss, sides)

    expected = result(adv, clean, mask)
    adv[SPOILT, 0], clean[SPOILT, 1] = NAN, INF
    for found, value in zip(result(adv, clean, mask), expected, strict=True):
        assert torch.equal(found, value)
    assert result(adv, clean, None)[0].isnan()
    assert result(adv, clean, ~mask)[0].isnan()
    error = squared_error(adv, clean, mask=mask)
    assert error.isfinite()
    assert squared_error(adv, clean).isnan()


@pytest.mark.parametrize("config", [MOVED, MOVED.replace(fused_head=False), MOVED.replace(labelled_capacity=0.5)])
def test_a_position_without_a_label_is_not_lost_from_sight(config):
    """It counts in no loss; its gradient keeps its row from climbing, which is counted, and the step is refused."""
    model, batch = tiny_models.bert_masked_lm(), tiny_models.masked_lm_batch()
    expected, _ = stepped(model, config, batch)
    model.zero_grad()
    assert batch["labels"][SPOILT, 4] == -100
    spoil(model.bert.encoder.layer[-1], position=4)
    found, telemetry = stepped(model, config, batch)
    assert torch.equal(found["task_loss"], expected["task_loss"])
    assert 0 < found["divergence"] < expected["divergence"]
    assert telemetry["non_finite"] == int(batch["attention_mask"][SPOILT].sum()) * 16
    guard = FiniteGuard()
    guard.watch(found)
    with pytest.warns(UserWarning, match=r"not finite: gradients bert\."):
        assert not guard.allows(model)


def test_a_batch_without_labels_has_no_loss_but_its_gradients_tell():
    model, batch = tiny_models.bert_masked_lm(), tiny_models.masked_lm_batch()
    figures, _ = stepped(model, MOVED, batch)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    objective = AdversarialObjective(model, MOVED)
    objective.backward(tiny_models.masked_lm_batch())  # a batch with labels shows that the head can be fused
    model.zero_grad()
    figures = objective.backward(batch)
    assert figures["loss"] == 0
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())
    model.zero_grad()
    spoil(model.bert.encoder.layer[-1])
    objective.backward(batch)
    assert refuses(FiniteGuard(), model)


def test_labels_without_room_are_refused_though_gradients_are_finite():
    model, batch = tiny_models.bert_masked_lm(), tiny_models.masked_lm_batch()
    figures, _ = stepped(model, MOVED.replace(labelled_capacity=0.1), batch)
    assert figures["loss"].isnan()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())
    guard = FiniteGuard(patience=1)
    guard.watch(figures)
    with pytest.raises(NonFiniteError, match=r"in the last one: loss nan, task_loss nan$"):
        guard.allows(model)


def test_a_prediction_of_nan_is_not_right():
    model, batch = tiny_models.bert(), tiny_models.classification_batch()
    batch["labels"] = torch.zeros_like(batch["labels"])  # the class that argmax takes where all are NaN
    spoil(model.classifier)
    with torch.no_grad():
        logits = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    right = (logits.argmax(-1) == 0) & ~logits.isnan().any(-1)
    assert not right[SPOILT]
    report = accuracy_under_attack(model, [batch], epsilon=1e-6, steps=1)
    assert report.clean_accuracy == right.sum().item() / 4
    assert math.isnan(report.clean_loss)


# gradients of the ascent


def points(config: AdversarialConfig, spoilt: float | None) -> tuple[list[Tensor], dict[str, float]]:
    """The embeddings in each pass of a step, whose gradients in one row are ``spoilt``, and the telemetry."""
    model, batch = tiny_models.BagOfEmbeddings(), tiny_models.classification_batch()
    seen: list[Tensor] = []

    def watch(_, args):
        (embeds,) = args
        seen.append(embeds.detach().clone())
        if spoilt is not None and embeds.requires_grad:
            row = (torch.arange(len(embeds)) == SPOILT)[:, None, None]
            embeds.register_hook(lambda grad: torch.where(row, spoilt, grad))

    model.inner.register_forward_pre_hook(watch)
    objective = AdversarialObjective(
        model,
        config.replace(modules=("embed",)),
        head="classification",
        loss=lambda logits, batch: nn.functional.cross_entropy(logits, batch["labels"]),
    )
    objective.forward(batch, seed=SEED, backward=Tensor.backward)
    return seen, objective.telemetry.read()


ASCENTS = {
    "tokens": MOVED.replace(level="token"),
    "sequences": MOVED.replace(level="sequence", norm="l2", normalize="l2", epsilon=1.0),
    "raw": MOVED.replace(normalize="none", level="sequence"),
    "sign": MOVED.replace(normalize="sign"),
    "the task": AdversarialConfig.pgd(std=1e-2, step_size=2e-2, epsilon=1.0),
    "on the way": AdversarialConfig.freelb(std=1e-2, step_size=2e-2, epsilon=1.0),
}


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("ascent", ASCENTS)
def test_a_row_without_a_finite_gradient_stays_where_it_was_and_the_others_climb(ascent, value):
    config = ASCENTS[ascent].replace(epsilon=1.0)  # the noise lies inside
    clean, _ = points(config, None)
    found, telemetry = points(config, value)
    start = found[-1 - config.steps]
    assert torch.equal(start, clean[-1 - config.steps])
    others = torch.arange(4) != SPOILT
    assert torch.equal(found[-1][others], clean[-1][others])
    assert torch.equal(found[-1][SPOILT], start[SPOILT])
    moved = (clean[-1] != start).flatten(1).any(1)
    assert moved.all()
    tokens = int(tiny_models.classification_batch()["attention_mask"][SPOILT].sum())
    assert telemetry["non_finite"] == tokens * start.shape[-1]


# the Trainer


class Spoiler(TrainerCallback):
    """The classifier's output is NaN in some steps, counted from 0; parameters after each step are kept."""

    def __init__(self, steps: set[int]) -> None:
        self.steps, self.parameters, self._hook = steps, [], None

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step in self.steps:
            self._hook = spoil(model.classifier)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self._hook is not None:
            self._hook.remove()
        self._hook = None
        self.parameters.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))


def spoilt_trainer(folder, steps: set[int], config: AdversarialConfig = MOVED, **options):
    options = {"max_steps": 4, "optim": "adamw_torch", "weight_decay": 0.1, "max_grad_norm": 1.0, **options}
    trainer, _ = trainer_of(tiny_models.bert(), folder, CLASSIFICATION, config, **options)
    spoiler = Spoiler(steps)
    trainer.add_callback(spoiler)
    return trainer, spoiler


ACCUMULATED = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.0}, ACCUMULATED])
def test_the_trainer_leaves_a_step_out_and_goes_on(tmp_path, options):
    trainer, spoiler = spoilt_trainer(tmp_path, {1}, **options)
    with pytest.warns(UserWarning, match=r"left out, .*loss nan.*divergence nan.*gradients bert\.embeddings"):
        trainer.train()
    first, second, third, _ = spoiler.parameters
    assert torch.equal(first, second)
    assert third.isfinite().all()
    assert not torch.equal(second, third)
    logged = [entry.get("adv_skipped_steps") for entry in trainer.state.log_history if "adv_divergence" in entry]
    assert logged == [None, 1, 1, 1]
    assert trainer.finite.guard.in_a_row == 0


@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_an_overflow_under_fp16_is_the_scalers_whether_gradients_are_clipped_or_not(tmp_path, monkeypatch, clip):
    trainer, _ = trainer_of(tiny_models.bert(), tmp_path, CLASSIFICATION, MOVED, max_steps=3, max_grad_norm=clip)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    monkeypatch.setattr(type(trainer.accelerator), "mixed_precision", "fp16")
    trainer.accelerator.scaler, trainer.accelerator.native_amp = scaler, True
    backwards = []

    def overflow(grad):
        backwards.append(1)
        return grad * torch.inf if len(backwards) == 1 else grad

    trainer.model.classifier.weight.register_hook(overflow)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer.train()
    assert scaler.get_scale() == 2.0**15
    assert trainer.finite.guard.skipped == 0
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    assert len(backwards) == 3


def test_the_names_are_those_before_clipping(tmp_path):
    trainer, _ = spoilt_trainer(tmp_path, set(), max_steps=1)
    trainer.model.classifier.bias.register_hook(lambda grad: grad * NAN)
    with pytest.warns(UserWarning, match=r"not finite: gradients classifier\.bias \(1 of"):
        trainer.train()


def test_ten_steps_in_a_row_stop_the_training(tmp_path):
    trainer, spoiler = spoilt_trainer(tmp_path, set(range(1, 20)), max_steps=20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(
            NonFiniteError, match=r"^10 optimizer steps in a row were not finite; .* loss nan, task_loss"
        ):
            trainer.train()
    assert len(spoiler.parameters) == 10
    assert torch.equal(spoiler.parameters[0], spoiler.parameters[-1])


def test_replays_leave_their_updates_out(tmp_path):
    config = AdversarialConfig.freeat(steps=2, std=0.1, step_size=0.1, epsilon=0.3)
    trainer, spoiler = spoilt_trainer(tmp_path, {1}, config, max_steps=3)
    with pytest.warns(UserWarning, match="left out"):
        trainer.train()
    assert torch.equal(spoiler.parameters[0], spoiler.parameters[1])
    assert trainer.finite.guard.skipped == 3  # two updates between the replays, and the Trainer's own
    assert not torch.equal(spoiler.parameters[1], spoiler.parameters[2])


def test_a_checkpoint_goes_on_counting(tmp_path):
    trainer, _ = spoilt_trainer(tmp_path, {1}, max_steps=3, save_strategy="steps", save_steps=2)
    with pytest.warns(UserWarning, match="left out"):
        trainer.train()
    later, _ = spoilt_trainer(tmp_path, set(), max_steps=4)
    later.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert later.finite.guard.skipped == 1
