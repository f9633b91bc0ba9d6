"""Steps of models that ``fully_shard`` splits, in several layouts; run as a program it is one rank, like rank_cases."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import rank_cases
import torch
from rank_cases import EVEN, MOVED, ON_THE_WAY, RAW, SEED, UNEVEN, Case, gradients
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_param_group

from alum_kernels import AdversarialConfig, AdversarialObjective

LOGITS = {"fused_head": False}
CASES = {
    "classification": Case("classification"),
    "masked_lm": Case("masked_lm", MOVED.replace(**LOGITS)),
    "masked_lm, low memory": Case("masked_lm", MOVED.replace(memory="low", **LOGITS)),
    "freelb": Case("classification", ON_THE_WAY),
    "pgd, raw gradient": Case("classification", RAW),
    "signal check": Case("classification", MOVED.replace(signal_check_interval=1)),
    "recomputed": Case("classification", recomputes=True),
    "depth": Case("classification", MOVED.replace(ascent_depth=1)),
    "fraction": Case("masked_lm", MOVED.replace(adversarial_fraction=0.5, **LOGITS), EVEN),
    "a rank without labels": Case("masked_lm", MOVED.replace(**LOGITS), UNEVEN, unlabelled=3),
}
HALF = {
    "classification": Case("classification", MOVED.replace(std=0.1, step_size=0.2, epsilon=0.2)),
    "low memory": Case("masked_lm", MOVED.replace(std=0.1, step_size=0.2, epsilon=0.2, memory="low", **LOGITS)),
}
ASCENT = {"bf16": Case("classification", MOVED.replace(std=0.1, step_size=0.2, epsilon=0.2, ascent_dtype="bfloat16"))}


def sharded(model: nn.Module, mesh: Any, *, units: bool = True, embeddings: bool = False, **options: Any) -> nn.Module:
    """A BERT whose layers are units of their own, or not; and its word embeddings, where they are not tied."""
    for layer in model.bert.encoder.layer if units else []:
        fully_shard(layer, mesh=mesh, **options)
    if embeddings:
        fully_shard(model.bert.embeddings.word_embeddings, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def layouts(case: Case, mesh: Any, ranks: int) -> dict[str, Callable[[nn.Module], nn.Module]]:
    """Ways to split the model of a case."""
    found = {
        "freed": lambda model: sharded(model, mesh, reshard_after_forward=True),
        "kept": lambda model: sharded(model, mesh, reshard_after_forward=False),
    }
    if case is CASES["classification"]:
        found["one unit"] = lambda model: sharded(model, mesh, units=False)
        found["embeddings apart"] = lambda model: sharded(model, mesh, embeddings=True)
    if ranks == 4:
        replicas = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
        found["replicas"] = lambda model: sharded(model, replicas)
    return found


def work(folder: Path, rank: int, ranks: int) -> dict[str, Any]:
    """Every case in every layout."""
    mesh = init_device_mesh("cpu", (ranks,))
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        found[name] = {
            # what the first step freed and gathered is what the second begins with
            layout: gradients(case, split(case.model()), rank, ranks, steps=2 if layout == "freed" else 1)
            for layout, split in layouts(case, mesh, ranks).items()
        }
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    found["half"] = {
        name: gradients(case, sharded(case.model().float(), mesh, mp_policy=half), rank, ranks)[0]
        for name, case in HALF.items()
    }
    found["ascent"] = {
        name: gradients(case, sharded(case.model().float(), mesh), rank, ranks)[0] for name, case in ASCENT.items()
    }
    found["gathers"] = count_gathers(mesh, rank, ranks)
    return found


def count_gathers(mesh: Any, rank: int, ranks: int) -> dict[str, dict[str, tuple[int, int]]]:
    """All-gathers and reduce-scatters of an encoder layer in one step, by method and layout."""
    methods = {
        "standard": MOVED.replace(start=10),
        "alum": MOVED.replace(steps=1),
        "alum, K = 2": MOVED,
        "low memory": MOVED.replace(steps=1, memory="low"),
        "r3f": AdversarialConfig.r3f(),
        "pgd": RAW.replace(steps=1),
        "freelb": ON_THE_WAY.replace(steps=1),
    }
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for name, config in methods.items():
        found[name] = {}
        for layout, freed in (("freed", True), ("kept", False)):
            case = Case("classification", config)
            model = sharded(case.model(), mesh, reshard_after_forward=freed)
            objective = AdversarialObjective(model, config, process_group=distributed.group.WORLD)
            own, begin = case.share(rank, ranks)
            with counted_gathers(".layer.0.") as counts:
                objective.backward(own, seed=torch.tensor([SEED]), sample_offset=begin)
            found[name][layout] = counts["gathers"], counts["reductions"]
    return found


@contextmanager
def counted_gathers(part: str) -> Iterator[Counter[str]]:
    """Counts ``gathers`` and ``reductions`` of the unit that has a parameter with ``part`` in its name."""
    counts: Counter[str] = Counter()
    before = _fsdp_param_group.foreach_all_gather, _fsdp_param_group.foreach_reduce

    def counted(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(params: list[Any], *rest: Any, **keywords: Any) -> Any:
            counts[kind] += any(part in param._param_fqn for param in params)
            return function(params, *rest, **keywords)

        return call

    _fsdp_param_group.foreach_all_gather = counted("gathers", before[0])
    _fsdp_param_group.foreach_reduce = counted("reductions", before[1])
    try:
        yield counts
    finally:
        _fsdp_param_group.foreach_all_gather, _fsdp_param_group.foreach_reduce = before


if __name__ == "__main__":
    rank_cases.as_rank(work)
