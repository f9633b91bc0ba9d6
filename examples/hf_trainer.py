"""The Hugging Face Trainer with one more argument: python -m examples.hf_trainer --steps 20."""

import argparse
import tempfile

from torch import nn
from transformers import TrainingArguments

from alum_kernels import AdversarialConfig
from alum_kernels.integrations.transformers import AdversarialTrainer
from examples.docstrings import start


def main(arguments: list[str] | None = None) -> tuple[nn.Module, list[dict[str, float]]]:
    """The trained model, and what the Trainer logged at each step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps (default: %(default)s)")
    steps = parser.parse_args(arguments).steps

    model, tokenizer, samples = start()
    with tempfile.TemporaryDirectory() as folder:
        trainer = AdversarialTrainer(
            model=model,
            args=TrainingArguments(
                folder,
                max_steps=steps,
                per_device_train_batch_size=8,
                gradient_accumulation_steps=2,
                learning_rate=2e-4,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
            ),
            train_dataset=samples,
            processing_class=tokenizer,
            adversarial=AdversarialConfig.smart(std=1e-2, epsilon=1e-2, step_size=1e-2),
        )
        trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    for step, entry in enumerate(history, 1):
        print(f"step {step}: loss {entry['loss']:.3f}, ascent gain {entry['adv_ascent_gain']:.2f}")
    return model, history


if __name__ == "__main__":
    main()
