"""DTensors as arguments of the ops: the linear divergences take a head's, every other argument is refused by name."""

from collections.abc import Callable

import pytest
import torch
from processes import group_of_one
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import alum_kernels

STEP = {"step_size": 0.1, "epsilon": 0.1}
EMBEDS = torch.linspace(-1, 1, 48).view(2, 3, 8)
PLACEMENTS = [Replicate(), Shard(0), Shard(2)]


@pytest.fixture
def mesh(tmp_path):
    """Of one process."""
    with group_of_one(tmp_path):
        yield init_device_mesh("cpu", (1,))


def ascent(embeds: Tensor, grad: Tensor, **options: object) -> Tensor:
    begin = {} if "delta" in options else {"seed": torch.tensor([3])}
    return alum_kernels.projected_ascent(embeds, grad, **{**STEP, **begin, **options})


DIVERGENCES = ("symmetric_kl", "symmetric_kl_grad", "kl", "js", "squared_hellinger", "squared_error")
CALLS: dict[str, tuple[str, Callable[[Tensor], object]]] = {
    **{f"{op}, first": ("adv_logits", lambda x, op=op: getattr(alum_kernels, op)(x, EMBEDS)) for op in DIVERGENCES},
    **{f"{op}, second": ("logits", lambda x, op=op: getattr(alum_kernels, op)(EMBEDS, x)) for op in DIVERGENCES},
    **{f"{op}, both": ("adv_logits", lambda x, op=op: getattr(alum_kernels, op)(x, x)) for op in DIVERGENCES},
    "noise_init": ("embeds", lambda x: alum_kernels.noise_init(x)),
    "projected_ascent": ("embeds", lambda x: ascent(x, EMBEDS)),
    "projected_ascent, gradient": ("grad", lambda x: ascent(EMBEDS, x)),
    "projected_ascent, delta": ("delta", lambda x: ascent(EMBEDS, EMBEDS, delta=x)),
    "linear_symmetric_kl, hidden": ("adv_hidden", lambda x: alum_kernels.linear_symmetric_kl(x, EMBEDS, EMBEDS[0])),
    "linear_kl, hidden": ("hidden", lambda x: alum_kernels.linear_kl(EMBEDS, x, EMBEDS[0])),
    "linear_symmetric_kl_grad, hidden": (
        "hidden",
        lambda x: alum_kernels.linear_symmetric_kl_grad(EMBEDS, x, EMBEDS[0]),
    ),
    "linear_products": ("hidden", lambda x: alum_kernels.linear_products(x, EMBEDS[0])),
}


@pytest.mark.parametrize("placement", PLACEMENTS, ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_a_dtensor_is_refused_by_name(call, placement, mesh):
    """However it is placed, on every backend: before one is chosen."""
    name, run = CALLS[call]
    with pytest.raises(TypeError, match=rf"^{name}: expected a plain tensor.*, got a DTensor.*{name}\..* gives"):
        run(distribute_tensor(EMBEDS.clone(), mesh, [placement]))


OTHERS: dict[str, tuple[Tensor, Callable[[Tensor], object]]] = {
    "mask": (torch.ones(2, 3, dtype=torch.bool), lambda x: alum_kernels.symmetric_kl(EMBEDS, EMBEDS, mask=x)),
    "seed": (torch.tensor([3]), lambda x: alum_kernels.noise_init(EMBEDS, seed=x)),
    "std": (torch.ones(2), lambda x: alum_kernels.noise_init(EMBEDS, std=x)),
    "step_size": (torch.ones(2), lambda x: ascent(EMBEDS, EMBEDS, step_size=x)),
    "epsilon": (torch.ones(2), lambda x: ascent(EMBEDS, EMBEDS, epsilon=x)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_goes_with_the_tensors_is_refused_too(name, mesh):
    plain, run = OTHERS[name]
    run(plain)
    with pytest.raises(TypeError, match=rf"^{name}: expected a plain tensor, got a DTensor with placements \(Repl"):
        run(distribute_tensor(plain, mesh, [Replicate()]))


@pytest.mark.parametrize("op", ["linear_symmetric_kl", "linear_kl", "linear_symmetric_kl_grad"])
@pytest.mark.parametrize("placement", [Replicate(), Shard(0)], ids=str)
def test_a_head_is_taken_apart(op, placement, mesh):
    """Of one rank, whole or split; ``vocabulary_ranks.py`` has more."""
    adv, weight = EMBEDS + 0.1 * EMBEDS.flip(0), torch.linspace(-2, 2, 80).view(10, 8).sin()
    expected = getattr(alum_kernels, op)(adv, EMBEDS, weight)
    found = getattr(alum_kernels, op)(adv, EMBEDS, distribute_tensor(weight, mesh, [placement]))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    if op == "linear_symmetric_kl_grad":
        products = alum_kernels.linear_products(EMBEDS, distribute_tensor(weight, mesh, [placement]))
        torch.testing.assert_close(products, EMBEDS.flatten(0, 1) @ weight.T, rtol=1e-6, atol=1e-6)
