"""PyTorch Lightning, with automatic optimization: python -m examples.lightning_module --steps 20."""

import argparse
import tempfile

import lightning
import torch
from torch import nn

from alum_kernels import AdversarialConfig, AdversarialObjective
from alum_kernels.integrations.lightning import AdversarialModuleMixin
from examples.docstrings import start


class Classifier(AdversarialModuleMixin, lightning.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.history = model, []

    def configure_adversarial(self) -> AdversarialObjective:
        config = AdversarialConfig.alum_finetuning(normalize="linf", std=1e-2, epsilon=1e-2, step_size=1e-2)
        return AdversarialObjective(self.model, config)

    def training_step(self, batch, batch_idx):
        loss = self.adversarial_loss(dict(batch))  # instead of self.model(**batch).loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=2e-4)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.history.append({name: value.item() for name, value in self.trainer.callback_metrics.items()})
        print("loss {loss:.3f}, ascent gain {adv_ascent_gain:.2f}".format(**self.history[-1]))


def main(arguments: list[str] | None = None) -> tuple[nn.Module, list[dict[str, float]]]:
    """The trained model, and what Lightning logged at each step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps (default: %(default)s)")
    steps = parser.parse_args(arguments).steps

    task = start()
    module = Classifier(task.model)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            default_root_dir=folder, max_steps=steps, log_every_n_steps=1, gradient_clip_val=1.0, **quiet
        )
        trainer.fit(module, task.loader(16))
    return module.model, module.history


if __name__ == "__main__":
    main()
