"""Language models that ``fully_shard`` splits, trained without logits; as a program it is one rank, like rank_cases.

The weight of the output projection is one of the parameters of a unit: of the whole model, of the head or of head and
embeddings together, kept or freed after a forward.
"""

import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import rank_cases
import torch
from rank_cases import EVEN, MOVED, ON_THE_WAY, SEED, UNEVEN, Case, gradients, whole
from sharded_cases import counted_gathers
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from alum_kernels import AdversarialObjective, linear_symmetric_kl

FUSED = MOVED.replace(fused_head=True)
ROUND = FUSED.replace(std=0.1, step_size=0.2, epsilon=0.2)
CASES = {
    "masked_lm": Case("masked_lm", FUSED),
    "low memory": Case("masked_lm", FUSED.replace(memory="low")),
    "freelb": Case("masked_lm", ON_THE_WAY.replace(fused_head=True)),
    "no clean loss": Case("masked_lm", FUSED.replace(clean_weight=0.0)),
    "all positions": Case("masked_lm", FUSED.replace(positions="all")),
    "signal check": Case("masked_lm", FUSED.replace(signal_check_interval=1)),
    "recomputed": Case("masked_lm", FUSED, recomputes=True),
    "fraction": Case("masked_lm", FUSED.replace(adversarial_fraction=0.5), EVEN),
    "a rank without labels": Case("masked_lm", FUSED, UNEVEN, unlabelled=3),
    "no adversary yet": Case("masked_lm", FUSED.replace(start=10)),
    "pretraining": Case("pretraining", FUSED),
    "causal_lm": Case("causal_lm", FUSED),
    "untied": Case("causal_lm", FUSED, tied=False),
    "untied, low memory": Case("causal_lm", FUSED.replace(memory="low"), tied=False),
    "untied, no clean loss": Case("causal_lm", FUSED.replace(clean_weight=0.0), tied=False),
}
EVERY_LAYOUT = ("masked_lm", "low memory", "untied")
FEW = ("masked_lm", "untied, low memory", "a rank without labels")
"""Cases of a run that takes little time, with the variable ``FEW_CASES``."""
HALF = {
    "tied": Case("masked_lm", ROUND),
    "tied, low memory": Case("masked_lm", ROUND.replace(memory="low")),
    "untied": Case("causal_lm", ROUND, tied=False),
}
ACCUMULATED = {"masked_lm": Case("masked_lm", FUSED, EVEN), "untied": Case("causal_lm", FUSED, EVEN, tied=False)}


def split(model: nn.Module, mesh: Any, *, units: bool = True, apart: str = "", **options: Any) -> nn.Module:
    """A BERT or GPT-2 whose layers are units of their own, or not; and its head, alone or with the embeddings."""
    bert = hasattr(model, "bert")
    head = model.cls if bert else model.lm_head
    for layer in (model.bert.encoder.layer if bert else model.transformer.h) if units else []:
        fully_shard(layer, mesh=mesh, **options)
    if apart == "head":
        fully_shard(head, mesh=mesh, **options)
    if apart == "head and embeddings":
        fully_shard([model.get_input_embeddings(), head], mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def in_half(model: nn.Module, mesh: Any, **options: Any) -> nn.Module:
    """Split, with passes in bf16 that give fp32."""
    policies = [
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=dtype)
        for dtype in (None, torch.float32)
    ]
    for layer in model.bert.encoder.layer if hasattr(model, "bert") else model.transformer.h:
        fully_shard(layer, mesh=mesh, mp_policy=policies[0], **options)
    return fully_shard(model, mesh=mesh, mp_policy=policies[1], **options)


def layouts(name: str, mesh: Any, ranks: int) -> dict[str, Callable[[nn.Module], nn.Module]]:
    """Ways to split the model of a case: those of ``split``."""
    case, shards = CASES[name], {"freed": {"reshard_after_forward": True}, "kept": {"reshard_after_forward": False}}
    ways: dict[str, dict[str, Any]] = {"freed": shards["freed"]}
    if name in EVERY_LAYOUT:
        ways |= {"as it is": {}, "kept": shards["kept"], "one unit, freed": {"units": False, **shards["freed"]}}
        ways |= {f"both, {kind}": {"apart": "head and embeddings", **options} for kind, options in shards.items()}
    if not case.tied:
        ways |= {f"head, {kind}": {"apart": "head", **options} for kind, options in shards.items()}
    if ranks == 4:
        replicas = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
        ways["replicas"] = {"mesh": replicas, **shards["freed"]}
    return {way: partial(split, **{"mesh": mesh, **options}) for way, options in ways.items()}


def accumulated(case: Case, model: nn.Module, rank: int, ranks: int) -> dict[str, Tensor]:
    """The gradients of two batches, of the first and of the second half of each rank's samples, reduced once."""
    objective = AdversarialObjective(model, case.config, process_group=distributed.group.WORLD)
    own, _ = case.share(rank, ranks)
    half = len(own["input_ids"]) // 2
    for turn in (0, 1):
        model.set_requires_gradient_sync(turn == 1)
        part = {name: value[turn * half :][:half] for name, value in own.items()}
        objective.backward(part, scale=0.5, seed=torch.tensor([SEED + turn]), sample_offset=rank * half)
        assert all((parameter.grad is None) == (turn == 0) for parameter in model.parameters())
    return {name: whole(parameter.grad) for name, parameter in model.named_parameters()}


def accumulated_alone(case: Case, ranks: int) -> dict[str, Tensor]:
    """The same by one process, with the samples of all ranks in both batches."""
    model = case.model()
    objective = AdversarialObjective(model, case.config)
    places = torch.arange(rank_cases.SAMPLES).view(ranks, 2, -1)
    for turn in (0, 1):
        part = {name: value[places[:, turn].flatten()] for name, value in case.batch().items()}
        objective.backward(part, scale=0.5, seed=torch.tensor([SEED + turn]))
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def work(folder: Path, rank: int, ranks: int) -> dict[str, Any]:
    """Every case in every layout, or a few, and what is measured of them."""
    mesh, few = init_device_mesh("cpu", (ranks,)), os.environ.get("FEW_CASES") is not None
    found: dict[str, Any] = {"cases": {}}
    for name, case in CASES.items() if not few else ((name, CASES[name]) for name in FEW):
        found["cases"][name] = {
            # what the first step freed and gathered is what the second begins with
            way: gradients(case, of_model(case.model()), rank, ranks, steps=2 if "freed" in way else 1)
            for way, of_model in layouts(name, mesh, ranks).items()
        }
    found["chosen"] = chosen(mesh, rank, ranks)
    found["taken for a split head"] = taken_for_a_split_head(mesh, rank)
    if few:
        return found
    found["half"] = {
        (name, kind): gradients(case, in_half(case.model().float(), mesh, **options), rank, ranks)[0]
        for name, case in HALF.items()
        for kind, options in (("as it is", {}), ("freed", {"reshard_after_forward": True}))
    }
    found["accumulated"] = {
        name: accumulated(case, split(case.model(), mesh, reshard_after_forward=True), rank, ranks)
        for name, case in ACCUMULATED.items()
    }
    found["gathers"] = count_gathers(mesh, rank, ranks)
    return found


def chosen(mesh: Any, rank: int, ranks: int) -> dict[str, Any]:
    """What ranks go by of which one alone has labels: whether the head is linear, and what warnings say."""
    found: dict[str, Any] = {}
    case = Case("masked_lm", MOVED, unlabelled=1)  # of the first rank
    for name in ("linear", "scaled"):
        model = case.model()
        if name == "scaled":
            model.cls.register_forward_hook(lambda module, inputs, output: 2 * output)
        objective = AdversarialObjective(split(model, mesh), MOVED, process_group=distributed.group.WORLD)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            objective.backward(case.share(rank, ranks)[0])
        said = [str(each.message) for each in caught if "is trained through its logits" in str(each.message)]
        told = [None] * ranks
        distributed.all_gather_object(told, (objective.linear_head is not None, said))
        found[name] = told
    return found


def taken_for_a_split_head(mesh: Any, rank: int) -> str:
    """What ``linear_symmetric_kl`` says to a weight that ``fully_shard`` splits, with hidden states of each rank's."""
    weight = split(CASES["untied"].model(), mesh).lm_head.weight
    hidden = torch.full((2, weight.shape[1]), float(rank), dtype=weight.dtype)
    try:
        linear_symmetric_kl(hidden + 1, hidden, weight)
    except ValueError as error:
        return str(error)
    return "nothing"


def count_gathers(mesh: Any, rank: int, ranks: int) -> dict[str, dict[str, tuple[int, int]]]:
    """All-gathers and reduce-scatters in one step of the unit that holds the head, by method and layout."""
    methods = {
        "standard": FUSED.replace(start=10),
        "alum": FUSED.replace(steps=1, telemetry=False),
        "alum, K = 2": FUSED.replace(telemetry=False),
        "low memory": FUSED.replace(steps=1, memory="low", telemetry=False),
        "alum, logits": MOVED.replace(steps=1, fused_head=False),
    }
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for name, config in methods.items():
        found[name] = {}
        for layout, freed in (("freed", True), ("kept", False)):
            case = Case("masked_lm", config)
            own, begin = case.share(rank, ranks)
            model = split(case.model(), mesh, reshard_after_forward=freed)
            objective = AdversarialObjective(model, config, process_group=distributed.group.WORLD)
            draw = {"seed": torch.tensor([SEED]), "sample_offset": begin}
            objective.backward(own, **draw)  # the first step looks at the model on one sample
            with counted_gathers(".word_embeddings.") as counts:
                objective.backward(own, **draw)
            found[name][layout] = counts["gathers"], counts["reductions"]
    return found


if __name__ == "__main__":
    rank_cases.as_rank(work)
