"""A Trainer with a loss of its own, and an adversary on top of it: python -m examples.own_trainer --steps 20."""

import argparse
import tempfile

from torch import nn
from transformers import Trainer, TrainingArguments

from alum_kernels import AdversarialConfig
from alum_kernels.integrations.transformers import AdversarialTrainerMixin
from examples.docstrings import start


class FocalTrainer(Trainer):
    """What one already has: each sample's cross-entropy times (1 - p) ** 2, p being its label's probability."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        losses = nn.functional.cross_entropy(outputs.logits, labels, reduction="none")
        loss = (losses * (1 - (-losses).exp()) ** 2).mean()
        return (loss, outputs) if return_outputs else loss


class AdversarialFocalTrainer(AdversarialTrainerMixin, FocalTrainer):
    """The same with an adversary; ``adversarial_trainer(FocalTrainer)`` is this class in one line."""


def main(arguments: list[str] | None = None) -> tuple[nn.Module, list[dict[str, float]]]:
    """The trained model, and what the Trainer logged at each step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps (default: %(default)s)")
    steps = parser.parse_args(arguments).steps

    model, tokenizer, samples = start()
    config = AdversarialConfig.alum_finetuning(normalize="linf", std=1e-2, epsilon=1e-2, step_size=1e-2)
    options = {"per_device_train_batch_size": 16, "learning_rate": 2e-4, "logging_steps": 1, "save_strategy": "no"}
    with tempfile.TemporaryDirectory() as folder:
        trainer = AdversarialFocalTrainer(
            model=model,
            args=TrainingArguments(folder, max_steps=steps, report_to="none", **options),
            train_dataset=samples,
            processing_class=tokenizer,
            adversarial=config,
        )
        trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    for step, entry in enumerate(history, 1):
        print(f"step {step}: loss {entry['loss']:.3f}, ascent gain {entry['adv_ascent_gain']:.2f}")
    return model, history


if __name__ == "__main__":
    main()
