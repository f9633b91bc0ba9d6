"""MT-DNN's ``SmartPerturbation`` with the import line changed, on a Hugging Face model.

    python -m examples.mtdnn_drop_in --steps 10

The adversarial loss comes from ``alum_kernels``; the rest is the loop that MT-DNN's users have.
"""

import itertools

import torch

# from mt_dnn.perturbation import SmartPerturbation
from alum_kernels.integrations.mtdnn import SmartPerturbation
from examples.docstrings import start
from examples.drop_in_options import drop_in_options

ADV_ALPHA = 1.0


def main() -> None:
    chosen = drop_in_options("examples.mtdnn_drop_in", __doc__)

    model, _, _ = task = start(source=chosen.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    teacher = SmartPerturbation(epsilon=1e-6, step_size=1e-3, noise_var=1e-5, norm_p="inf", k=1)

    batches = itertools.cycle(task.loader(chosen.batch_size))
    for step, batch in enumerate(itertools.islice(batches, chosen.steps), start=1):
        inputs = (batch["input_ids"], batch.get("token_type_ids"), batch["attention_mask"])
        outputs = model(**batch)
        adv_loss, embed_size, step_share = teacher.forward(model, outputs.logits, *inputs)
        loss = outputs.loss + ADV_ALPHA * adv_loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(
            f"step {step}  task loss {outputs.loss:.4f}  adversarial loss {adv_loss:.3e}  "
            f"embeddings {embed_size:.3f}  step's part in delta {step_share:.1e}"
        )


if __name__ == "__main__":
    main()
