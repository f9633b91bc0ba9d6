"""Language models whose output projection ``parallelize_module`` has split: trained as unsplit ones, or why not."""

import warnings

import pytest
import tiny_models
import torch
from processes import group_of_one
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from alum_kernels import AdversarialConfig, AdversarialObjective
from alum_kernels.adversarial.linear_head import PROBED_CLASSES, find_linear_head

MOVED = AdversarialConfig.alum_finetuning(std=1e-2, epsilon=1e-1, step_size=1e-1, normalize="linf")


@pytest.fixture
def mesh(tmp_path):
    with group_of_one(tmp_path):
        yield init_device_mesh("cpu", (1,))


GATHERED, KEPT = ColwiseParallel(output_layouts=Replicate()), ColwiseParallel()


def split_model(mesh, style=GATHERED) -> nn.Module:
    model = tiny_models.make("gpt2", "causal_lm", dtype=torch.float64, tie_word_embeddings=False)
    return parallelize_module(model, mesh, {"lm_head": style})


@pytest.mark.parametrize("style", [GATHERED, KEPT])
def test_a_split_projection_is_trained_as_a_whole_one(mesh, style):
    """Over one rank; ``vocabulary_ranks.py`` has more. The model may gather its logits or keep this rank's."""
    batch, results = tiny_models.batch("causal_lm"), []
    whole = tiny_models.make("gpt2", "causal_lm", dtype=torch.float64, tie_word_embeddings=False)
    for model in (whole, split_model(mesh, style)):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*trained through its logits")
            output = AdversarialObjective(model, MOVED.replace(fused_head=True)).forward(batch, seed=torch.tensor([3]))
        output.loss.backward()
        weight = model.lm_head.weight.grad
        results.append((output, weight.full_tensor() if model is not whole else weight))
    (expected, want), (found, weight) = results
    torch.testing.assert_close(found.task_loss, expected.task_loss, rtol=1e-7, atol=0)
    torch.testing.assert_close(found.divergence, expected.divergence, rtol=1e-9, atol=0)
    torch.testing.assert_close(weight, want, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("fused", [None, False])
def test_a_split_projection_is_not_trained_by_data_parallel_ranks(fused, mesh):
    """Whether through its logits or not."""
    config, both = MOVED.replace(fused_head=fused), init_device_mesh("cpu", (1, 1), mesh_dim_names=("data", "tensor"))
    model = nn.parallel.DistributedDataParallel(split_model(both["tensor"]), device_mesh=both["data"])
    with pytest.raises(ValueError, match=r"^model: expected .* got module.lm_head.weight, a part of a DTensor"):
        AdversarialObjective(model, config)
    model = split_model(both["tensor"])
    for layer in model.transformer.h:
        fully_shard(layer, mesh=both["data"])
    with pytest.raises(ValueError, match=r"^model: expected fully_shard alone, got lm_head.weight, a DTensor that no"):
        AdversarialObjective(model, config)
    model = fully_shard(split_model(both["tensor"]), mesh=both["data"])
    with pytest.raises(ValueError, match=r"^model: expected fully_shard alone, got lm_head.weight with placements"):
        AdversarialObjective(model, config)


def test_what_is_not_fused_says_why(mesh):
    rowwise = find_linear_head(split_model(mesh, RowwiseParallel()))
    assert rowwise == "its output embeddings hold a DTensor with placements (Shard(dim=1),), not Shard(dim=0)"
    sharded = tiny_models.make("gpt2", "causal_lm", tie_word_embeddings=False)
    fully_shard(sharded, mesh=mesh)
    assert find_linear_head(sharded).split is None, "its weight is whole where it is used"
    model = split_model(mesh)
    with pytest.warns(UserWarning, match="its logits: its vocabulary is split .*backend='native' does not"):
        assert AdversarialObjective(model, MOVED.replace(backend="native")).linear_head is None
    head = find_linear_head(model)
    head.split.sizes = (70, 3)
    assert head.split.obstacle(PROBED_CLASSES) == "a rank has 3 of its classes, fewer than 8"
    with head.capturing() as captured:
        logits = model.lm_head(torch.randn(2, 3, 16, dtype=torch.float64))
    assert logits.shape == (2, 3, PROBED_CLASSES)
    head.split.sizes = (70,)
    assert head.mismatch(captured, logits) is None
    assert head.mismatch(captured, logits + 1).startswith("its logits are not its output projection's")
