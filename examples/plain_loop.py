"""A loop of one's own, with two micro-batches an optimizer step: python -m examples.plain_loop --steps 20."""

import argparse
import itertools

import torch
from torch import nn

from alum_kernels import AdversarialConfig, AdversarialObjective, NoisePlace
from examples.docstrings import start

ACCUMULATED = 2


def main(arguments: list[str] | None = None) -> tuple[nn.Module, list[dict[str, float]]]:
    """The trained model, and the figures of each step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps (default: %(default)s)")
    steps = parser.parse_args(arguments).steps

    model, _, _ = task = start()
    adversarial = AdversarialObjective(
        model, AdversarialConfig.alum_finetuning(normalize="linf", std=1e-2, epsilon=1e-2, step_size=1e-2)
    )
    place = NoisePlace(adversarial)  # in several processes also the rank, and how many there are
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
    batches = itertools.cycle(task.loader(8))
    history = []
    for step in range(steps):
        loss = 0.0
        for _ in range(ACCUMULATED):
            batch = next(batches)
            seed, sample_offset = place.next(len(batch["labels"]), step)
            # for a batch that is a whole step, adversarial(**batch).loss.backward() does as well
            figures = adversarial.backward(batch, scale=1 / ACCUMULATED, seed=seed, sample_offset=sample_offset)
            loss += figures["loss"].item() / ACCUMULATED
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        history.append({"loss": loss, **adversarial.telemetry.read()})
        print(f"step {step + 1}: loss {loss:.3f}, ascent gain {history[-1]['ascent_gain']:.2f}")
    return model, history


if __name__ == "__main__":
    main()
