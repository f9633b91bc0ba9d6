"""What a ``transformers.Trainer`` may not do to a model with an adversary: distribute it by other means than DDP."""

from transformers import Trainer

from alum_kernels.adversarial.parallelism import is_fully_sharded
from alum_kernels.integrations.accelerate import other_distribution


def check_distribution(trainer: Trainer) -> None:
    """Raises ValueError unless a Trainer runs in one process or under ``DistributedDataParallel``."""
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"args: expected one device a process, got {trainer.args.n_gpu} GPUs in this one, which the Trainer puts "
            "under DataParallel, whose replicas carry no hooks; start one process a GPU with torchrun, "
            "or set CUDA_VISIBLE_DEVICES"
        )
    kind = other_distribution(trainer.accelerator)
    if kind is not None:
        raise ValueError(f"args: expected a single process or DistributedDataParallel, got {kind}")
    if is_fully_sharded(trainer.model):
        raise ValueError("model: expected one without fully_shard, which was never tested with the Trainer")
    for name in ("tp", "cp", "sp"):
        size = getattr(trainer, f"get_{name}_size", lambda: 1)()
        if size > 1:
            raise ValueError(f"args: expected no {name} parallelism, got a size of {size}")
