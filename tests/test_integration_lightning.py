"""``AdversarialModuleMixin`` in Lightning: its gradients, its log, its checkpoints, and what it refuses."""

import pickle

import pytest
import tiny_models
import torch
from tiny_loops import APART, FAR, FROM_FP32, assert_alike, assert_same, plain_gradients, rows_of, watched
from tiny_trainer import MOVED, ON_THE_WAY
from torch import nn
from torch.utils.data import DataLoader

from alum_kernels import AdversarialConfig, AdversarialObjective
from alum_kernels.integrations.lightning import CHECKPOINT_KEY, AdversarialModuleMixin

lightning = pytest.importorskip("lightning")

BATCHES = [tiny_models.classification_batch(8, seed=seed) for seed in range(4)]
TAUGHT = MOVED.replace(proximal=2.0, proximal_momentum=0.5)
LATER = AdversarialConfig.pgd(std=0.0, step_size=0.2, epsilon=0.3, start=0.5)


class Module(AdversarialModuleMixin, lightning.LightningModule):
    """A user's module, which keeps the gradients that its optimizer gets."""

    def __init__(self, model: nn.Module, config: AdversarialConfig) -> None:
        super().__init__()
        self.model, self.config = model, config
        self.gradients: list[torch.Tensor] = []

    def configure_adversarial(self):
        return AdversarialObjective(self.model, self.config)

    def training_step(self, batch, batch_idx):
        return self.adversarial_loss(batch)

    def on_before_optimizer_step(self, optimizer):
        self.gradients.append(tiny_models.Gradients.of(self.model).flat())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Manual(Module):
    """The same in manual optimization, four micro-batches a step."""

    accumulated = 4

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.adversarial_backward(batch, scale=1 / self.accumulated)
        if (batch_idx + 1) % self.accumulated == 0:
            optimizer = self.optimizers()
            optimizer.step()
            optimizer.zero_grad()


def trainer_of(folder, **options):
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    return lightning.Trainer(default_root_dir=folder, **{**defaults, **options})


def loader(size: int, batches=BATCHES) -> DataLoader:
    return DataLoader([part for batch in batches for part in rows_of(batch, size)], batch_size=None)


def bert():
    return tiny_models.bert().double()


@pytest.mark.parametrize("size", [8, 2])
@pytest.mark.parametrize("config", [MOVED, TAUGHT, LATER], ids=["alum", "teacher", "later"])
def test_micro_batches_leave_the_gradients_of_the_plain_loop(config, size, tmp_path):
    module = Module(bert(), config)
    trainer_of(tmp_path, accumulate_grad_batches=8 // size).fit(module, loader(size))
    assert_same(module.gradients, plain_gradients(bert(), BATCHES, config))


@pytest.mark.parametrize("config", [ON_THE_WAY, MOVED.replace(memory="low"), MOVED], ids=["freelb", "low", "alum"])
def test_manual_optimization_takes_methods_with_several_backwards(config, tmp_path):
    module = Manual(bert(), config)
    trainer_of(tmp_path).fit(module, loader(2))
    assert_same(module.gradients, plain_gradients(bert(), BATCHES, config))


def test_clipping_leaves_what_the_plain_loop_leaves(tmp_path):
    class Clipped(Module):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            self.gradients[-1] = tiny_models.Gradients.of(self.model).flat()

    module = Clipped(bert(), MOVED)
    trainer_of(tmp_path, gradient_clip_val=0.3, accumulate_grad_batches=4).fit(module, loader(2))
    assert all(gradient.norm() == pytest.approx(0.3, rel=1e-4) for gradient in module.gradients)
    assert_same(module.gradients, plain_gradients(bert(), BATCHES, MOVED, max_norm=0.3))


def in_fp16():
    """What Lightning makes of "16-mixed" on a GPU."""
    kind = lightning.pytorch.plugins.MixedPrecision
    return kind("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**12))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(
    ("kind", "config"),
    [(Module, FAR), (Manual, ON_THE_WAY), (Manual, FAR.replace(memory="low"))],
    ids=["alum", "freelb", "low"],
)
def test_mixed_precision_trains_as_a_plain_loop_under_autocast(kind, config, precision, tmp_path):
    options, dtype = {"precision": "bf16-mixed"}, torch.bfloat16
    if precision == "fp16":
        options, dtype = {"plugins": [in_fp16()]}, torch.float16
    module = kind(tiny_models.bert(), config)
    seen = watched(module.model.bert.encoder.layer[0].attention.self.query)
    trainer_of(tmp_path, accumulate_grad_batches=4 if kind is Module else 1, **options).fit(
        module, loader(2, BATCHES[:2])
    )
    assert set(seen) == {dtype}
    expected = plain_gradients(tiny_models.bert(), BATCHES[:2], config, autocast=dtype)
    assert_alike(module.gradients[:1], expected[:1], APART[dtype])
    assert_alike(module.gradients, expected, FROM_FP32[dtype])  # steps from slightly different parameters
    assert_alike(module.gradients[:1], plain_gradients(tiny_models.bert(), BATCHES[:1], config), FROM_FP32[dtype])


def test_lightning_takes_bf16_for_fp16_on_a_cpu(tmp_path):
    with pytest.warns(UserWarning, match="AMP with fp16 is not supported on CPU"):
        trainer = trainer_of(tmp_path, precision="16-mixed")
    assert trainer.precision == "bf16-mixed"


def test_the_figures_are_in_the_log_of_every_so_manieth_step(tmp_path):
    written = []

    class Logger(lightning.pytorch.loggers.logger.DummyLogger):
        def log_metrics(self, metrics, step=None):
            written.append((step, metrics))

    trainer_of(tmp_path, logger=Logger(), log_every_n_steps=2).fit(Module(bert(), MOVED), loader(8))
    model = bert()
    objective = AdversarialObjective(model, MOVED)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = []
    for step, batch in enumerate(BATCHES):
        objective.backward(batch)
        optimizer.step()
        optimizer.zero_grad()
        if step % 2 == 1:
            expected.append({f"adv_{name}": value for name, value in objective.telemetry.read().items()})
    figures = [{name: value for name, value in metrics.items() if name.startswith("adv_")} for _, metrics in written]
    figures = [found for found in figures if found]
    assert len(figures) == len(expected) == 2
    for found, wanted in zip(figures, expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)
        assert found["adv_ascent_gain"] > 1


def test_a_resumed_run_goes_on_with_noise_and_teacher(tmp_path):
    whole = Module(bert(), TAUGHT)
    saving = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    trainer_of(tmp_path, max_epochs=2, enable_checkpointing=True, callbacks=[saving]).fit(whole, loader(8, BATCHES[:2]))
    path = tmp_path / "epoch=0.ckpt"
    resumed = Module(tiny_models.bert(seed=1).double(), TAUGHT)
    trainer_of(tmp_path, max_epochs=2).fit(resumed, loader(8, BATCHES[:2]), ckpt_path=path, weights_only=True)
    assert len(whole.gradients) == 4
    assert_same(resumed.gradients, whole.gradients[2:])

    checkpoint = torch.load(path, weights_only=False)
    del checkpoint[CHECKPOINT_KEY]
    with pytest.warns(UserWarning, match="no entry 'alum_kernels', so the noise starts anew"):
        Module(bert(), TAUGHT).on_load_checkpoint(checkpoint)


@pytest.mark.parametrize("config", [MOVED, TAUGHT], ids=["alum", "teacher"])
def test_the_same_trainer_goes_back_to_a_checkpoint(config, tmp_path):
    """A second fit has optimizers of its own, which a teacher follows, and its first step draws its own seed."""
    module, trainer = Module(bert(), config), trainer_of(tmp_path, max_epochs=1)
    trainer.fit(module, loader(8))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    for _ in range(2):
        del module.gradients[4:]
        trainer.fit_loop.max_epochs = 2
        trainer.fit(module, loader(8), ckpt_path=tmp_path / "half.ckpt", weights_only=False)
        assert_same(module.gradients, plain_gradients(bert(), BATCHES * 2, config))


def test_a_module_is_pickled_without_its_training(tmp_path):
    module = Module(bert(), MOVED)
    trainer_of(tmp_path, max_steps=1).fit(module, loader(8))
    module.model = None  # the model's hooks are the objective's
    copy = pickle.loads(pickle.dumps(module))
    assert copy._objective is None
    assert copy.config == MOVED


def test_what_is_not_supported_is_refused(tmp_path, monkeypatch):
    fit = trainer_of(tmp_path, max_steps=1).fit
    with pytest.raises(ValueError, match=r"^training_step: expected adversarial_backward\(batch\) .* for freelb"):
        fit(Module(bert(), ON_THE_WAY), loader(8))

    class Automatic(Module):
        def training_step(self, batch, batch_idx):
            return self.adversarial_backward(batch)["loss"]

    with pytest.raises(ValueError, match=r"^adversarial_backward: expected manual optimization, got automatic"):
        fit(Automatic(bert(), ON_THE_WAY), loader(8))

    class Validating(Module):
        def validation_step(self, batch, batch_idx):
            self.adversarial_loss(batch)

    with pytest.raises(RuntimeError, match=r"^adversarial_loss: expected a call in training_step"):
        trainer_of(tmp_path).validate(Validating(bert(), MOVED), loader(8))

    class Forgetful(Module):
        configure_adversarial = AdversarialModuleMixin.configure_adversarial

    with pytest.raises(NotImplementedError, match=r"^configure_adversarial: expected Forgetful to return"):
        fit(Forgetful(bert(), MOVED), loader(8))
    sharded = type("FSDPStrategy", (), {})
    monkeypatch.setattr(lightning.Trainer, "strategy", property(lambda self: sharded()))
    module = Module(bert(), MOVED)
    module._trainer = trainer = object.__new__(lightning.Trainer)
    with pytest.raises(ValueError, match=r"^strategy: expected a single device or DDPStrategy, got FSDPStrategy"):
        module._begin_training(module.adversarial)
    assert module.trainer is trainer
