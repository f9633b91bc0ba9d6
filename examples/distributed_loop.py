"""A training loop of one's own over processes: each rank has a part of the batch, and all together its gradient.

    torchrun --nproc-per-node 2 -m examples.distributed_loop

Runs on CPUs with gloo, on GPUs with NCCL. However many processes there are, the losses are the same; also where some
have no sample, and where one meets a number that is not finite: then all of them leave that step out.
"""

import gc

import torch
from torch import Tensor, distributed, nn

from alum_kernels import AdversarialConfig, AdversarialObjective, FiniteGuard

VOCABULARY, LENGTH, SAMPLES, STEPS = 100, 12, 30, 40
CONFIG = AdversarialConfig.alum_finetuning(modules=("embed",), normalize="linf", std=0.1, step_size=0.1, epsilon=0.1)


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden, self.out = nn.Embedding(VOCABULARY, 32), nn.Linear(32, 32), nn.Linear(32, 2)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.out(torch.tanh(self.hidden(self.embed(input_ids))).mean(1))


def global_batch(step: int) -> dict[str, Tensor]:
    """Whether most tokens are of the lower half of the vocabulary; every rank makes the same."""
    ids = torch.randint(VOCABULARY, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(step))
    return {"input_ids": ids, "labels": ((ids < VOCABULARY // 2).float().mean(1) > 0.5).long()}


def train(device: torch.device) -> None:
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(Classifier().to(device))
    adversarial = AdversarialObjective(
        model,
        CONFIG,
        head="classification",
        loss=lambda logits, batch: nn.functional.cross_entropy(logits, batch["labels"]),
        process_group=distributed.group.WORLD,  # labels are counted over all ranks
    )
    optimizer, guard = torch.optim.Adam(model.parameters(), lr=0.03), FiniteGuard()
    for step in range(STEPS):
        own = torch.arange(SAMPLES).tensor_split(ranks)[rank]  # consecutive places of the global batch
        batch = {name: value[own].to(device) for name, value in global_batch(step).items()}
        begin = int(own[0]) if len(own) else SAMPLES
        figures = adversarial.backward(batch, sample_offset=begin)  # where the noise of this share begins
        guard.allows(model)  # takes away gradients that are not finite, from the optimizers of all ranks
        optimizer.step(), optimizer.zero_grad()
        distributed.all_reduce(figures["loss"])
        if rank == 0 and step % 10 == 9:
            print(f"step {step + 1}, loss {float(figures['loss']) / ranks:.4f}", flush=True)


def main() -> None:
    gpu = torch.cuda.is_available()
    distributed.init_process_group("nccl" if gpu else "gloo")
    train(torch.device("cuda", distributed.get_node_local_rank()) if gpu else torch.device("cpu"))
    gc.collect()  # the model holds the group, whose threads end with it only if nothing does
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
