"""Models whose parameters ``fully_shard`` splits over processes: their gradients are those of one process."""

import pytest
import rank_cases
import sharded_cases
import tiny_models
import torch
from accelerate import Accelerator, DistributedType
from processes import group_of_one, run_ranks
from rank_cases import MOVED, Case, gradients
from sharded_cases import ASCENT, CASES, HALF, sharded
from tiny_trainer import CLASSIFICATION, trainer_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from alum_kernels import AdversarialConfig, AdversarialObjective
from alum_kernels.adversarial.captured import obstacle
from alum_kernels.adversarial.parallelism import check_parallelism, is_fully_sharded
from alum_kernels.integrations.transformers import AdversarialTrainer


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_sharded_ranks_have_the_gradient_of_one_process(ranks, tmp_path):
    """Wherever parameters are kept or freed after a forward, and whatever is a unit of its own."""
    run_ranks(ranks, sharded_cases.__file__, str(tmp_path))
    found = torch.load(tmp_path / f"gradients-{ranks}.pt")
    ran = 0
    for name, case in CASES.items():
        expected, loss = gradients(case, case.model())
        for layout, (own, own_loss) in found[name].items():
            where = f"{name}, {layout}"
            assert float(own_loss) == pytest.approx(float(loss), rel=1e-8, abs=1e-12), where
            assert own.keys() == expected.keys(), where
            for parameter, grad in expected.items():
                torch.testing.assert_close(
                    own[parameter], grad, rtol=1e-8, atol=1e-11, msg=lambda m, n=f"{where}, {parameter}": f"{n}: {m}"
                )
            ran += 1
    assert ran > len(CASES)
    compare_half(found["half"], HALF)
    for name, own in found["ascent"].items():
        expected, _ = gradients(ASCENT[name], ASCENT[name].model().float())
        assert distance(own, expected) < 1e-4, name
    assert_few_gathers(found["gathers"])


def compare_half(found: dict[str, dict[str, torch.Tensor]], cases: dict[str, Case]) -> None:
    """bf16 passes round, but no further from the gradient in float64 than those of an unsharded bf16 model."""
    for name, own in found.items():
        case = cases[name]
        exact, _ = gradients(case, case.model())
        rounded, _ = gradients(case, case.model().bfloat16())
        errors = [distance(grads, exact) for grads in (own, rounded)]
        assert 0 < errors[0] < 1.5 * errors[1], (name, errors)
        assert errors[0] < 0.1, (name, errors)


def distance(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Of all gradients together, relative."""
    parts = [(found[name].double() - grad, grad) for name, grad in wanted.items()]
    top, bottom = (torch.stack([pair[side].norm() for pair in parts]).norm() for side in (0, 1))
    return float(top / bottom)


def assert_few_gathers(found: dict[str, dict[str, tuple[int, int]]]) -> None:
    """All-gathers and reduce-scatters of a layer in a step, as docs/distributed.md counts them.

    Freed after a forward, it is gathered in each forward and in each backward through it. Kept, it is gathered again
    where a backward, which frees it, went before.
    """
    assert found == {
        "standard": {"freed": (2, 1), "kept": (1, 1)},
        "alum": {"freed": (6, 1), "kept": (3, 1)},
        "alum, K = 2": {"freed": (8, 1), "kept": (4, 1)},
        "low memory": {"freed": (7, 2), "kept": (3, 2)},
        "r3f": {"freed": (4, 1), "kept": (2, 1)},
        "pgd": {"freed": (4, 1), "kept": (2, 1)},
        "freelb": {"freed": (4, 2), "kept": (2, 2)},
    }


@pytest.fixture
def mesh(tmp_path):
    """Of one process."""
    with group_of_one(tmp_path):
        yield init_device_mesh("cpu", (1,))


REFUSED = {
    "differentiates twice": AdversarialConfig.llr(),
    "inner_steps > 0, whose passes stop": AdversarialConfig.yopo(),
    "proximal > 0, whose teacher": MOVED.replace(proximal=1.0),
    "delta_lifetime > 1, by which ranks": MOVED.replace(delta_lifetime=2),
}


@pytest.mark.parametrize("why", REFUSED)
def test_methods_that_cannot_be_sharded_say_why(why, mesh):
    """Before the first step, also where the model is split after it was wrapped."""
    message = rf"^model: expected DistributedDataParallel, or no fully_shard, for .*{why}"
    with pytest.raises(ValueError, match=message):
        AdversarialObjective(sharded(tiny_models.bert(), mesh), REFUSED[why])
    model = tiny_models.bert()
    objective = AdversarialObjective(model, REFUSED[why])
    sharded(model, mesh)
    samples = list(range(4)) if REFUSED[why].delta_lifetime > 1 else None
    if REFUSED[why].proximal:
        objective.follow(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match=message):
        objective.backward(tiny_models.classification_batch(), samples=samples)


def test_a_step_that_would_make_other_passes_than_other_ranks_is_refused(mesh):
    objective = AdversarialObjective(sharded(tiny_models.bert(), mesh), MOVED.replace(adversarial_fraction=0.9))
    with pytest.raises(ValueError, match=r"^adversarial_fraction: expected a batch of which fewer .*, got 4 samples"):
        objective(**tiny_models.classification_batch())


def test_a_model_that_is_split_after_it_was_wrapped_has_the_same_gradient(mesh):
    batch, results = tiny_models.classification_batch(), []
    for late in (False, True):
        model = tiny_models.bert().double()
        if not late:
            sharded(model, mesh, embeddings=True)
        objective = AdversarialObjective(model, MOVED.replace(adversarial_fraction=0.5))
        if late:
            sharded(model, mesh, embeddings=True)
        objective.backward(batch, seed=torch.tensor([3]))
        results.append(torch.cat([rank_cases.whole(p.grad).flatten() for p in model.parameters()]))
    assert results[0].norm() > 1e-3
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("fused", [True, False])
def test_parameters_that_a_forward_of_the_callers_left_gathered(fused, mesh):
    """They are DTensors again before the objective looks at them."""
    batch, results = tiny_models.masked_lm_batch(), []
    for forward in (False, True):
        model = sharded(tiny_models.bert_masked_lm(), mesh, reshard_after_forward=False)
        if forward:
            with torch.no_grad():
                model(**batch)
        objective = AdversarialObjective(model, MOVED.replace(fused_head=fused))
        objective.backward(batch, seed=torch.tensor([3]))
        results.append(torch.cat([rank_cases.whole(p.grad).flatten() for p in model.parameters()]))
    assert results[0].norm() > 1e-3
    assert torch.equal(*results)


def test_parameters_that_were_gathered_after_a_first_step_that_failed(mesh):
    """The mesh is asked for where a batch first goes through the head, which is later than the first look."""
    batch, results = tiny_models.masked_lm_batch(), []
    for fails in (False, True):
        model = sharded(tiny_models.bert_masked_lm(), mesh, units=False, reshard_after_forward=False)
        objective = AdversarialObjective(
            model, MOVED.replace(fused_head=True), process_group=torch.distributed.group.WORLD
        )
        if fails:
            with pytest.raises(ValueError, match=r"^batch: expected 'labels'"):
                objective.backward({name: value for name, value in batch.items() if name != "labels"})
            with torch.no_grad():
                model(**batch)
        objective.backward(batch, seed=torch.tensor([3]))
        results.append(torch.cat([rank_cases.whole(p.grad).flatten() for p in model.parameters()]))
    assert results[0].norm() > 1e-3
    assert torch.equal(*results)


@pytest.mark.parametrize("options", [{"fused_head": True}, {"fused_head": False, "memory": "low"}], ids=str)
def test_weights_that_autocast_cast_in_an_earlier_pass(options, mesh):
    """Every gradient is reduced in the step that it belongs to, the first one's included."""
    batch, results = tiny_models.masked_lm_batch(), []
    for split in (False, True):
        model = tiny_models.bert_masked_lm()
        model = sharded(model, mesh, reshard_after_forward=True) if split else model
        objective = AdversarialObjective(model, MOVED.replace(**options))
        for seed in (3, 4):
            model.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                objective.backward(batch, scale=seed, seed=torch.tensor([seed]))
            results.append(torch.cat([rank_cases.whole(p.grad).flatten() for p in model.parameters()]))
    for alone, own in zip(results[:2], results[2:], strict=True):
        assert float((own - alone).norm() / alone.norm()) < 0.02


def test_a_loss_of_the_callers_does_not_use_a_sharded_head(mesh):
    """Which is not gathered where that loss would take it."""
    batch = tiny_models.masked_lm_batch()
    objective = AdversarialObjective(sharded(tiny_models.bert_masked_lm(), mesh), MOVED)

    def run_task(model, batch):
        outputs = model(**batch)
        return outputs.loss, outputs

    with pytest.warns(UserWarning, match="its logits: its task loss is the caller's, and fully_shard gathers the weig"):
        objective.forward(batch, run_task=run_task, loss_without_logits=True)
    assert objective.linear_head is None


def test_steps_of_sharded_models_and_of_groups_are_not_captured(mesh):
    for objective in (
        AdversarialObjective(sharded(tiny_models.bert(), mesh), MOVED),
        AdversarialObjective(tiny_models.bert(), MOVED, process_group=torch.distributed.group.WORLD),
    ):
        assert obstacle(objective, None) == "ranks talk to each other in a step, which is not captured"


def test_the_trainer_refuses_what_it_was_never_tested_with(mesh, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"^model: expected one without fully_shard, which was never tested"):
        trainer_of(sharded(tiny_models.bert(), mesh), tmp_path, CLASSIFICATION)
    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "distributed_type", property(lambda self: DistributedType.FSDP))
        with pytest.raises(ValueError, match=r"^args: .* got FSDP, which was never tested .* can use fully_shard$"):
            trainer_of(tiny_models.bert(), tmp_path, CLASSIFICATION)
    group = torch.distributed.group.WORLD
    monkeypatch.setattr(
        AdversarialTrainer,
        "create_objective",
        lambda self, model: AdversarialObjective(model, self.adversarial, process_group=group),
    )
    with pytest.raises(ValueError, match=r"^process_group: expected None of create_objective, since the Trainer"):
        trainer_of(tiny_models.bert(), tmp_path, CLASSIFICATION)


def test_other_splits_are_refused_by_name(mesh):
    with pytest.raises(ValueError, match=r"^model: .* got FullyShardedDataParallel \(FSDP1\), whose flat"):
        AdversarialObjective(FullyShardedDataParallel(tiny_models.bert(), device_id=torch.device("cpu")), MOVED)
    meshes = init_device_mesh("cpu", (1, 1), mesh_dim_names=("one", "other"))
    model = tiny_models.bert()
    fully_shard(model.bert.encoder.layer[0], mesh=meshes["one"])
    fully_shard(model, mesh=meshes["other"])
    with pytest.raises(ValueError, match=r"^model: expected fully_shard over one mesh, got .* beside .*"):
        AdversarialObjective(model, MOVED)
    model = tiny_models.bert()
    parallelize_module(model.bert.encoder.layer[0].intermediate, mesh, {"dense": ColwiseParallel()})
    assert not is_fully_sharded(model)
    with pytest.raises(ValueError, match=r"^model: .* got bert.encoder.layer.0.* split by it"):
        AdversarialObjective(model, MOVED)
    both = init_device_mesh("cpu", (1, 1), mesh_dim_names=("data", "tensors"))
    model = tiny_models.bert()
    parallelize_module(model.bert.encoder.layer[0].intermediate, both["tensors"], {"dense": ColwiseParallel()})
    fully_shard(model, mesh=both["data"])
    with pytest.raises(ValueError, match=r"^model: expected fully_shard alone, got .* as of tensor parallelism"):
        AdversarialObjective(model, MOVED)
    with pytest.raises(ValueError, match=r"^process_group: expected the 1 ranks .*, got 2"):
        check_parallelism(sharded(tiny_models.bert(), mesh), MOVED, ranks=2)
