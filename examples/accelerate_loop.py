"""A loop with Hugging Face Accelerate: accelerate launch -m examples.accelerate_loop --steps 20."""

import argparse
import itertools

import torch
from accelerate import Accelerator
from torch import nn

from alum_kernels import AdversarialConfig
from alum_kernels.integrations.accelerate import AcceleratedObjective
from examples.docstrings import start


def main(arguments: list[str] | None = None) -> tuple[nn.Module, list[dict[str, float]]]:
    """The trained model, and the figures of each step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps (default: %(default)s)")
    steps = parser.parse_args(arguments).steps

    accelerator = Accelerator(gradient_accumulation_steps=2)
    inner, _, _ = task = start()
    optimizer = torch.optim.AdamW(inner.parameters(), lr=2e-4)
    model, optimizer, loader = accelerator.prepare(inner, optimizer, task.loader(8))
    config = AdversarialConfig.alum_finetuning(normalize="linf", std=1e-2, epsilon=1e-2, step_size=1e-2)
    adversarial = AcceleratedObjective(model, config, accelerator=accelerator)
    accelerator.register_for_checkpointing(adversarial)  # save_state and load_state go on with the noise
    history = []
    for batch in itertools.chain.from_iterable(itertools.repeat(loader)):
        with accelerator.accumulate(model):
            figures = adversarial.backward(batch)  # by accelerator.backward, also of methods that have several a batch
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            history.append({"loss": figures["loss"].item(), **adversarial.telemetry.read()})
            loss, gain = history[-1]["loss"], history[-1]["ascent_gain"]
            accelerator.print(f"step {adversarial.optimizer_steps}: loss {loss:.3f}, ascent gain {gain:.2f}")
        if adversarial.optimizer_steps == steps:
            return inner, history
    raise ValueError(f"--steps: expected at least 1, got {steps}")


if __name__ == "__main__":
    main()
