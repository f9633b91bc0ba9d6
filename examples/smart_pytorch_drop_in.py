"""``smart_pytorch.SMARTLoss`` with the import line changed, on a Hugging Face model called with ``inputs_embeds``.

python -m examples.smart_pytorch_drop_in --steps 10
"""

import itertools

import torch
from torch import Tensor

# from smart_pytorch import SMARTLoss, kl_loss, sym_kl_loss
from alum_kernels.integrations.smart_pytorch import SMARTLoss, kl_loss, sym_kl_loss
from examples.docstrings import start
from examples.drop_in_options import drop_in_options

WEIGHT = 0.02


def main() -> None:
    chosen = drop_in_options("examples.smart_pytorch_drop_in", __doc__)

    model, _, _ = task = start(source=chosen.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    batches = itertools.cycle(task.loader(chosen.batch_size))
    for step, batch in enumerate(itertools.islice(batches, chosen.steps), start=1):
        labels, mask = batch["labels"], batch["attention_mask"]

        def logits_of(embed: Tensor, mask: Tensor = mask) -> Tensor:
            return model(inputs_embeds=embed, attention_mask=mask).logits

        embed = model.get_input_embeddings()(batch["input_ids"])
        state = logits_of(embed)
        task_loss = torch.nn.functional.cross_entropy(state, labels)
        smart = SMARTLoss(logits_of, kl_loss, loss_last_fn=sym_kl_loss)
        adv_loss = smart(embed, state)
        (task_loss + WEIGHT * adv_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}  task loss {task_loss:.4f}  adversarial loss {adv_loss:.3e}")


if __name__ == "__main__":
    main()
