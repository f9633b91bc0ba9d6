"""A loop of one's own over processes: ranks with a part of the batch each have the gradient of one with the whole."""

import pytest
import rank_cases
import tiny_models
import torch
from processes import group_of_one, run_ranks
from rank_cases import CASES, MOVED, SAMPLES, gradients
from torch import nn

from alum_kernels import AdversarialObjective
from alum_kernels.adversarial.heads import Head
from alum_kernels.adversarial.parallelism import check_parallelism
from alum_kernels.adversarial.ranks import RankCounts


@pytest.mark.filterwarnings("ignore:.* is trained through its logits")
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_have_the_gradient_of_one_process(ranks, tmp_path):
    """Where they have different numbers of samples and labels, some of them none."""
    run_ranks(ranks, rank_cases.__file__, str(tmp_path))
    found = torch.load(tmp_path / f"gradients-{ranks}.pt")
    for name, case in CASES.items():
        expected, loss = gradients(case, case.model())
        own, own_loss = found[name]
        assert float(own_loss) == pytest.approx(float(loss), rel=1e-8, abs=1e-12), name
        assert own.keys() == expected.keys(), name
        for parameter, grad in expected.items():
            torch.testing.assert_close(
                own[parameter], grad, rtol=1e-8, atol=1e-11, msg=lambda m, n=f"{name}, {parameter}": f"{n}: {m}"
            )
        moved = torch.stack([grad.norm() for grad in expected.values()]).norm()
        assert (moved > 1e-3) == (case.unlabelled != 0), name
    assert len(found["refused"]) == 2
    assert all("expected DistributedDataParallel without static_graph for" in why for why in found["refused"])
    before, without, after = found["not finite"]
    assert before == after
    assert all(torch.tensor(before).isfinite())
    assert all(torch.tensor(without).isnan()), "every rank sees that one of them has no gradient"


@pytest.fixture
def alone(tmp_path):
    """A process group of one."""
    with group_of_one(tmp_path) as group:
        yield group


@pytest.mark.parametrize("name", ["classification", "masked_lm", "pretraining, logits", "spans", "llr", "freelb"])
def test_a_group_of_one_changes_nothing(name, alone):
    case = CASES[name]
    results = []
    for group in (None, alone):
        model = case.model()
        objective = AdversarialObjective(model, case.config, process_group=group)
        figures = objective.backward(case.batch(), seed=torch.tensor([4]))
        results.append((figures, tiny_models.Gradients.of(model).flat()))
    (figures, grads), (own_figures, own_grads) = results
    torch.testing.assert_close(own_figures, figures, rtol=1e-12, atol=0)
    torch.testing.assert_close(own_grads, grads, rtol=1e-10, atol=1e-14)


def test_what_a_group_cannot_count_is_refused(alone):
    with pytest.raises(TypeError, match=r"^process_group: expected a torch.distributed.ProcessGroup .*, got int"):
        AdversarialObjective(tiny_models.bert(), MOVED, process_group=3)
    objective = AdversarialObjective(tiny_models.bert_masked_lm(), MOVED, process_group=alone)
    with pytest.raises(ValueError, match=r"^batch: expected no 'num_items_in_batch' with a process_group"):
        objective(**tiny_models.masked_lm_batch(), num_items_in_batch=5)
    objective = AdversarialObjective(
        tiny_models.bert_pretraining(),
        MOVED.replace(fused_head=False),
        loss=lambda outputs, batch: outputs.prediction_logits.sum(),
        process_group=alone,
    )
    with pytest.raises(
        ValueError, match=r"^loss: expected the model's own with a process_group for a pretraining head"
    ):
        objective(**tiny_models.pretraining_batch())


def test_the_host_waits_for_no_count(alone):
    waits = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
                waits.append(func)
            return func(*args, **(kwargs or {}))

    objective = AdversarialObjective(
        tiny_models.BagOfEmbeddings(),
        MOVED.replace(modules=("embed",)),
        head="classification",
        loss=lambda logits, batch: nn.functional.cross_entropy(logits, batch["labels"]),
        process_group=alone,
    )
    with Watch():
        objective.backward(tiny_models.classification_batch())
        for head in ("masked_lm", "pretraining", "regression"):
            counts = RankCounts(alone, Head(head), "all", compares=True)
            counts.weights(tiny_models.pretraining_batch(), torch.device("cpu"))
        assert not waits
        torch.ones(()).item()
    assert waits


def test_a_share_begins_where_the_shares_of_the_ranks_before_end(alone, monkeypatch):
    """Without a place given, as where every rank has as many samples."""
    places = []
    objective = AdversarialObjective(tiny_models.bert(), MOVED, process_group=alone)
    monkeypatch.setattr(type(objective), "run_step", lambda self, batch, plan, draw, *_: places.append(draw) or 1 / 0)
    for rank in (0, 3):
        monkeypatch.setattr(torch.distributed.ProcessGroup, "rank", lambda self, rank=rank: rank)
        with pytest.raises(ZeroDivisionError):
            objective.forward(tiny_models.classification_batch(SAMPLES))
    assert [draw.sample_offset for draw in places] == [0, 3 * SAMPLES]


def test_other_ways_to_distribute_a_model_are_refused_by_name(alone):
    with pytest.raises(ValueError, match=r"^model: .* got DataParallel, whose replicas carry no hooks"):
        AdversarialObjective(nn.DataParallel(tiny_models.bert()), MOVED)

    class DeepSpeedEngine(nn.Module):
        __module__ = "deepspeed.runtime.engine"

    with pytest.raises(ValueError, match=r"^model: .* got DeepSpeed's DeepSpeedEngine, whose partitioned"):
        AdversarialObjective(DeepSpeedEngine(), MOVED)
    with pytest.raises(ValueError, match=r"^process_group: expected the 1 ranks .*, got 2"):
        check_parallelism(nn.parallel.DistributedDataParallel(tiny_models.bert()), MOVED, ranks=2)
