"""One rank of a group that splits a vocabulary: every check of ``test_split_vocabulary.py`` that needs processes.

``python vocabulary_ranks.py CHECKS FOLDER`` runs the named checks, separated by commas, as one rank of
``processes.run_ranks``; a failed assertion ends it with a traceback.
"""

import math
import re
import sys

import pytest
import torch
import torch.distributed as dist
from linear_operands import FUNCTIONS, NAMES, error, in_float64, operands, value_and_gradients
from processes import join_group
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from alum_kernels import (
    AdversarialConfig,
    AdversarialObjective,
    linear_products,
    linear_symmetric_kl,
    linear_symmetric_kl_grad,
)
from alum_kernels.ops.linear_cross_entropy import linear_cross_entropy
from alum_kernels.ops.reductions import REDUCTIONS
from alum_kernels.ops.symmetric_kl import GRADIENTS

MASK = torch.tensor([1, 0, 1, 1, 1, 0, 1])


def refused(kind: type[Exception], message: str, call) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        call()


class Ranks:
    """The group, and what this rank has of it."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks, self.group = rank, ranks, dist.group.WORLD

    def sizes(self, columns: int, last: int) -> list[int]:
        """Classes of each rank: ``last`` for the last, the others uneven."""
        sizes = [last]
        for left in range(self.ranks - 1, 0, -1):
            sizes.insert(0, columns - sum(sizes) if left == 1 else (columns - sum(sizes)) // 3)
        return sizes

    def place(self, sizes: list[int]) -> slice:
        begin = sum(sizes[: self.rank])
        return slice(begin, begin + sizes[self.rank])

    def own(self, given: dict[str, Tensor], own: slice) -> dict[str, Tensor]:
        return {name: x[own] if name in ("weight", "bias") else x for name, x in given.items()}

    def assert_everywhere_the_same(self, tensor: Tensor) -> None:
        everywhere = [torch.empty_like(tensor) for _ in range(self.ranks)]
        dist.all_gather(everywhere, tensor)
        assert all(torch.equal(other, tensor) for other in everywhere)

    def compare(self, given, sizes, divergence="symmetric_kl", *, tolerance=(1e-12, 1e-11), **options):
        """Value and gradients of this rank's slice against one process in float64, within ``tolerance`` of them."""
        own = self.place(sizes)
        loss, gradients = in_float64(given, divergence, **options)
        found = value_and_gradients(self.own(given, own), divergence, group=self.group, **options)
        assert error(found[0], loss) <= tolerance[0], (divergence, options, error(found[0], loss))
        for name, want in self.own(gradients, own).items():
            off = error(found[1][name], want)
            assert off <= tolerance[1], (name, divergence, options, off)
        for tensor in (found[0], found[1]["hidden"], found[1]["adv_hidden"]):
            self.assert_everywhere_the_same(tensor)
        return found


def conventions(ranks: Ranks) -> None:
    """Divergence, gradient, mask, reduction, temperature, scale, soft cap; slices even, uneven, of one class, none."""
    chunk = 3 * 70 * 8 * 26  # several chunks, whose number no rank can tell from its own slice
    for last in (70 // ranks.ranks, 1, 0):
        for divergence in FUNCTIONS:
            for gradient in GRADIENTS:
                for mask in (None, MASK):
                    options = {"gradient": gradient, "mask": mask, "chunk_bytes": chunk, "upstream": -3.0}
                    ranks.compare(operands(dtype=torch.float64), ranks.sizes(70, last), divergence, **options)
    sizes = ranks.sizes(70, 20)
    for gradient in GRADIENTS:
        for perturbation in (1e-3, 2.0):
            given = operands(dtype=torch.float64, perturbation=perturbation)
            options = {"soft_cap": 4.0, "logit_scale": 0.5, "temperature": 0.7, "chunk_bytes": chunk}
            ranks.compare(given, sizes, gradient=gradient, tolerance=(1e-11, 1e-10), **options)
    for reduction in REDUCTIONS:
        for gather_rows in (True, False):
            options = {"reduction": reduction, "mask": MASK, "gather_rows": gather_rows}
            ranks.compare(operands(dtype=torch.float64), sizes, **options)
    given = operands(dtype=torch.float64)
    given["bias"][ranks.sizes(70, 20)[0] - 3 :] = -math.inf  # this leaves the other ranks without weight
    alive = {name: x[: sizes[0] - 3] if name in ("weight", "bias") else x for name, x in given.items()}
    found = value_and_gradients(ranks.own(given, ranks.place(sizes)), "symmetric_kl", group=ranks.group)
    expected = in_float64(alive, "symmetric_kl")
    assert error(found[0], expected[0]) <= 1e-12
    assert error(found[1]["hidden"], expected[1]["hidden"]) <= 1e-12
    assert ranks.rank == 0 or (found[1]["weight"] == 0).all()
    given = operands(rows=0, dtype=torch.float64)
    ranks.compare(given, sizes)


def accuracy(ranks: Ranks) -> None:
    """fp32 over 30,522 words, a class raised by 24 on any rank: value 1e-6, gradients 1e-5; the same bits again.

    Beside a raised class the rounding of the products alone, in which the rows have no part, moves the value by 1.4e-6.
    """
    sizes = ranks.sizes(30522, 30522 // ranks.ranks)
    for perturbation in (1e-5, 0.1):
        for raised in (None, *range(ranks.ranks)):
            given = operands(8, 96, 30522, perturbation, spread=0.3)
            if raised is not None:
                given["bias"][sum(sizes[:raised]) + 5] += 24
            found = ranks.compare(given, sizes, tolerance=(1e-6 if raised is None else 2e-6, 1e-5))
    again = value_and_gradients(ranks.own(given, ranks.place(sizes)), "symmetric_kl", group=ranks.group)
    assert torch.equal(again[0], found[0])
    assert all(torch.equal(again[1][name], found[1][name]) for name in NAMES)
    half = {name: tensor.bfloat16() for name, tensor in operands(perturbation=0.1).items()}
    ranks.compare(half, ranks.sizes(70, 20), tolerance=(2e-6, 2 * torch.finfo(torch.bfloat16).eps))


def ascent(ranks: Ranks) -> None:
    """The gradient to adv_hidden alone, clean products kept or not."""
    given, sizes = operands(dtype=torch.float64), ranks.sizes(70, 20)
    own = ranks.own(given, ranks.place(sizes))
    options = {"mask": MASK, "reduction": "sum", "temperature": 0.7}
    want, gradient = linear_symmetric_kl_grad(*given.values(), grad_scale=8.0, **options)
    kept = linear_products(own["hidden"], own["weight"])
    for products in (None, kept):
        found = linear_symmetric_kl_grad(
            *own.values(), grad_scale=8.0, clean_products=products, group=ranks.group, **options
        )
        assert error(found[0], want) <= 1e-12
        assert error(found[1], gradient) <= 1e-11
        ranks.assert_everywhere_the_same(found[1])


def cross_entropy(ranks: Ranks) -> None:
    """Against one process, labels on every rank, some rows without; a label of nobody's."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(70, (7,), generator=generator)
    labels[3] = -100
    for sizes in (ranks.sizes(70, 20), ranks.sizes(70, 1), ranks.sizes(70, 0)):
        for options in ({}, {"logit_scale": 0.5, "soft_cap": 3.0}):
            given = {n: x for n, x in operands(dtype=torch.float64).items() if n != "adv_hidden"}
            place = ranks.place(sizes)
            results = []
            for tensors, group in ((given, None), (ranks.own(given, place), ranks.group)):
                leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
                loss = linear_cross_entropy(
                    leaves["hidden"], leaves["weight"], labels, leaves["bias"], group=group, chunk_bytes=1200, **options
                )
                (loss * -3).backward()
                results.append((loss.detach(), {name: leaf.grad for name, leaf in leaves.items()}))
            (want, gradients), (loss, found) = results
            assert error(loss, want) <= 1e-13
            for name, gradient in ranks.own(gradients, place).items():
                assert error(found[name], gradient) <= 1e-12, name
            ranks.assert_everywhere_the_same(found["hidden"])
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)):
        exact = {name: tensor.to(dtype).double().requires_grad_() for name, tensor in given.items()}
        want = linear_cross_entropy(exact["hidden"], exact["weight"], labels, exact["bias"])
        want.backward()
        leaves = {name: tensor.to(dtype).requires_grad_() for name, tensor in ranks.own(given, place).items()}
        loss = linear_cross_entropy(leaves["hidden"], leaves["weight"], labels, leaves["bias"], group=ranks.group)
        loss.backward()
        assert loss.dtype == torch.float32
        assert error(loss.detach(), want.detach()) <= 1e-6
        for name, gradient in ranks.own({name: tensor.grad for name, tensor in exact.items()}, place).items():
            assert leaves[name].grad.dtype == dtype
            assert error(leaves[name].grad, gradient) <= tolerance, (name, dtype)
    own = ranks.own(given, place)
    nobody = torch.where(labels == -100, labels, 70)
    assert linear_cross_entropy(own["hidden"], own["weight"], nobody, group=ranks.group).item() == math.inf


def distributed_tensors(ranks: Ranks) -> None:
    """Weights as DTensors, cut by PyTorch: more classes than ranks divide, fewer classes than ranks."""
    mesh = init_device_mesh("cpu", (ranks.ranks,))
    for columns in (71, ranks.ranks - 1):
        given = operands(dtype=torch.float64, columns=columns)
        expected = in_float64(given, "symmetric_kl")
        for declared in (True, False):
            leaves = {
                name: distribute_tensor(x, mesh, [Shard(0) if name in ("weight", "bias") else Replicate()])
                if declared or name in ("weight", "bias")
                else x.clone()
                for name, x in given.items()
            }
            leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
            loss = linear_symmetric_kl(*leaves.values(), reduction="mean")
            loss.backward()
            assert not isinstance(loss, DTensor)
            assert error(loss.detach(), expected[0]) <= 1e-12
            for name, leaf in leaves.items():
                if isinstance(leaf, DTensor):
                    assert leaf.grad.placements == leaf.placements
                gradient = leaf.grad.full_tensor() if isinstance(leaf, DTensor) else leaf.grad
                # one class leaves no divergence, and its gradients nothing but zeros
                assert error(gradient, expected[1][name]) <= 1e-11, name
            _, gradient = linear_symmetric_kl_grad(*(leaf.detach() for leaf in leaves.values()))
            assert isinstance(gradient, DTensor) == declared
            plain = gradient.to_local() if declared else gradient
            assert error(plain, expected[1]["adv_hidden"]) <= 1e-11
    products = linear_products(given["hidden"], leaves["weight"])
    assert products.shape[1] == leaves["weight"].to_local().shape[0]
    whole = {
        name: distribute_tensor(x, mesh, [Replicate()]) if name in ("weight", "bias") else x
        for name, x in given.items()
    }
    assert error(linear_symmetric_kl(*whole.values()), expected[0]) <= 1e-12
    cut = distribute_tensor(operands()["hidden"], mesh, [Shard(1)])
    weight = distribute_tensor(operands()["weight"], mesh, [Shard(0)])
    refused(ValueError, "adv_hidden: expected placement Replicate()", lambda: linear_symmetric_kl(cut, cut, weight))


def mesh_of_two_dimensions(ranks: Ranks) -> None:
    """Four ranks, two copies of a head that two ranks split: hidden states must say that all have the same."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "classes"))
    given = operands(dtype=torch.float64, columns=71)
    expected = in_float64(given, "symmetric_kl")
    head, states = [Replicate(), Shard(0)], [Replicate(), Replicate()]
    leaves = {
        name: distribute_tensor(x, mesh, head if name in ("weight", "bias") else states).requires_grad_()
        for name, x in given.items()
    }
    loss = linear_symmetric_kl(*leaves.values())
    loss.backward()
    assert error(loss.detach(), expected[0]) <= 1e-12
    for name, leaf in leaves.items():
        assert error(leaf.grad.full_tensor(), expected[1][name]) <= 1e-11, name
    plain = {**leaves, "hidden": given["hidden"], "adv_hidden": given["adv_hidden"]}
    message = "adv_hidden: expected a DTensor, Replicate on every dimension"
    refused(ValueError, message, lambda: linear_symmetric_kl(*plain.values()))
    # the cure that the message names: each copy is a group of its own, with hidden states of its own
    slices = {name: leaves[name].detach().to_local() for name in ("weight", "bias")}
    moved = {name: x + mesh.get_local_rank("copies") if "hidden" in name else x for name, x in given.items()}
    loss = linear_symmetric_kl(**{**moved, **slices}, group=mesh.get_group("classes"))
    assert error(loss, in_float64(moved, "symmetric_kl")[0]) <= 1e-12


def disagreements(ranks: Ranks) -> None:
    """Ranks that make different calls all raise, instead of waiting for each other."""
    given = ranks.own(operands(), ranks.place(ranks.sizes(70, 20)))
    moved = {**given, "hidden": given["hidden"] + ranks.rank * 1e-3}
    refused(ValueError, "hidden: expected the same on every rank", lambda: call(moved))
    refused(ValueError, "hidden and options: expected the same", lambda: call(given, temperature=1.0 + ranks.rank))
    refused(ValueError, "mask: expected the same", lambda: call(given, mask=MASK.roll(ranks.rank).bool()))
    fewer = {n: x[: 7 - ranks.rank] if "hidden" in n else x for n, x in given.items()}
    refused(ValueError, "hidden and options: expected the same", lambda: call(fewer))
    none = {**given, "weight": given["weight"][:0], "bias": given["bias"][:0]}
    refused(ValueError, "weight: expected at least one class on some rank", lambda: call(none))
    refused(RuntimeError, "only backend=None", lambda: call(given, backend="reference"))
    undefined = {**given, "hidden": given["hidden"].clone()}
    undefined["hidden"][1, 2] = math.inf
    rows = call(undefined, reduction="none")
    assert rows.isnan().tolist() == [False, True] + [False] * 5
    clean = call(given, reduction="none")
    assert torch.equal(rows[2:], clean[2:])


def call(given: dict[str, Tensor], **options) -> Tensor:
    return linear_symmetric_kl(*given.values(), group=dist.group.WORLD, **options)


def language_models(ranks: Ranks) -> None:
    """Models whose output projection parallelize_module has split, trained without their logits, as unsplit ones."""
    import tiny_models  # transformers takes its time

    config = AdversarialConfig.alum_finetuning(std=1e-2, epsilon=1e-1, step_size=1e-1, normalize="linf")
    mesh = init_device_mesh("cpu", (ranks.ranks,))
    for family, projection in (("llama", "lm_head"), ("gpt2", "lm_head"), ("bert", "cls.predictions.decoder")):
        task = "masked_lm" if family == "bert" else "causal_lm"
        batch, results = tiny_models.batch(task), []
        for split, method in ((False, config), (True, config), (True, config.replace(steps=2, positions="all"))):
            model = tiny_models.make(family, task, dtype=torch.float64, tie_word_embeddings=False)
            if split:
                plan = {projection: ColwiseParallel(output_layouts=Replicate())}
                parallelize_module(model, mesh, plan)
            objective = AdversarialObjective(model, method.replace(fused_head=True))
            assert (objective.linear_head.split is not None) == split
            output = objective.forward(batch, seed=torch.tensor([3]))
            output.loss.backward()
            gradients = {
                name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
                for name, p in model.named_parameters()
                if p.grad is not None
            }
            results.append((output, gradients))
        (want, expected), (found, gradients), (twice, _) = results
        assert error(found.task_loss.detach(), want.task_loss.detach()) <= 1e-7  # some take their loss in fp32
        assert error(found.divergence, want.divergence) <= 1e-6
        assert twice.divergence > 0
        assert gradients.keys() == expected.keys()
        for name, gradient in expected.items():
            assert error(gradients[name], gradient) <= 1e-6, name


def language_models_in_half(ranks: Ranks) -> None:
    """The same under autocast, scaled in fp16."""
    import tiny_models
    from tiny_loops import APART, FAR, assert_alike

    mesh, batch = init_device_mesh("cpu", (ranks.ranks,)), tiny_models.batch("causal_lm")
    for dtype, scale in ((torch.bfloat16, 1.0), (torch.float16, 2.0**12)):
        results = []
        for split in (False, True):
            model = tiny_models.make("gpt2", "causal_lm", tie_word_embeddings=False)
            if split:
                parallelize_module(model, mesh, {"lm_head": ColwiseParallel(output_layouts=Replicate())})
            objective = AdversarialObjective(model, FAR.replace(fused_head=True))
            assert (objective.linear_head.split is not None) == split
            with torch.autocast("cpu", dtype):
                objective.backward(batch, scale=scale, seed=torch.tensor([3]))
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            grads = [grad.full_tensor() if isinstance(grad, DTensor) else grad for grad in grads]
            results.append(torch.cat([grad.flatten() for grad in grads]) / scale)
        assert_alike(results[1:], results[:1], APART[dtype], str(dtype))


def compiled(ranks: Ranks) -> None:
    """torch.compile leaves the call out of its graph, and says so where a whole graph is asked for."""
    given = ranks.own(operands(), ranks.place(ranks.sizes(70, 20)))

    def step(*tensors: Tensor) -> Tensor:
        return linear_symmetric_kl(*(tensor * 1.5 for tensor in tensors), group=ranks.group) * 2

    want = step(*given.values())
    torch.testing.assert_close(torch.compile(step, backend="eager")(*given.values()), want)
    torch._dynamo.reset()
    whole = torch.compile(step, backend="eager", fullgraph=True)
    refused(RuntimeError, "its ranks send each other tensors", lambda: whole(*given.values()))


if __name__ == "__main__":
    checks, folder = sys.argv[1:]
    rank, ranks = join_group(folder)
    for name in checks.split(","):
        globals()[name](Ranks(rank, ranks))
    dist.destroy_process_group()
