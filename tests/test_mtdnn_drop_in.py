"""The drop-in for MT-DNN's ``SmartPerturbation`` against its algorithm, written by hand in float64."""

import sys

import pytest
import tiny_models
import torch
from mtdnn_oracle import LARGE_STEP, Network, inputs, written
from processes import group_of_one
from torch import Tensor, nn

from alum_kernels import AdversarialConfig, AdversarialObjective, noise_init
from alum_kernels.integrations.mtdnn import SmartPerturbation, SymKlCriterion, TaskType


def same(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-13)


def check(task: TaskType, own_calls: bool, **options) -> None:
    classes = {TaskType.Regression: 1, TaskType.Ranking: 1}.get(task, 3)
    pairwise = 2 if task == TaskType.Ranking else 1
    model, given = Network(classes, own_calls), inputs()
    mask = given["attention_mask"]
    embeds = model.embed(given["input_ids"], given["token_type_ids"])
    torch.manual_seed(7)
    _, delta = noise_init(embeds, std=1e-2, mask=mask, return_delta=True)
    clean = model.body(embeds, mask)
    loss, share = written(
        lambda point: model.body(point, mask), embeds, clean, delta, task, pairwise=pairwise, **options
    )
    names, parameters = zip(*model.named_parameters(), strict=True)
    expected = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))

    teacher = SmartPerturbation(step_size=LARGE_STEP, noise_var=1e-2, **options)
    clean = model(**given)
    torch.manual_seed(7)
    found, embed_size, found_share = teacher.forward(model, clean, *given.values(), task_type=task, pairwise=pairwise)
    found.backward()
    same(found.detach(), loss.detach())
    same(embed_size, embeds.detach().abs().mean())
    same(found_share, share)
    assert int(teacher.non_finite) == 0
    assert loss > 1e-6
    for name, parameter in model.named_parameters():
        same(parameter.grad, expected[name])
    assert expected["inner.weight"].abs().max() > 1e-6


@pytest.mark.parametrize("own_calls", [False, True])
@pytest.mark.parametrize("task", list(TaskType))
@pytest.mark.parametrize("k", [1, 3])
def test_it_is_the_algorithm_written_by_hand(task, k, own_calls):
    check(task, own_calls, k=k)


@pytest.mark.parametrize("norm_level", [0, 1])
@pytest.mark.parametrize("norm_p", ["inf", "l2", "l1"])
@pytest.mark.parametrize("epsilon", [1e-6, 3e-3])
def test_norms_levels_and_what_is_added(norm_p, norm_level, epsilon):
    check(TaskType.Classification, False, k=2, norm_p=norm_p, norm_level=norm_level, epsilon=epsilon)


def test_a_hugging_face_model_is_perturbed_at_the_output_of_its_embeddings():
    model, batch = tiny_models.bert().double(), tiny_models.classification_batch()
    mask = batch["attention_mask"]
    embeds = model.bert.embeddings(batch["input_ids"])

    def logits_of(point: Tensor) -> Tensor:
        handle = model.bert.embeddings.register_forward_hook(lambda module, args, output: point)
        logits = model(batch["input_ids"], mask).logits
        handle.remove()
        return logits

    torch.manual_seed(7)
    _, delta = noise_init(embeds, std=1e-2, mask=mask, return_delta=True)
    loss, _ = written(logits_of, embeds, logits_of(embeds), delta, k=2)
    expected = torch.autograd.grad(loss, model.bert.embeddings.word_embeddings.weight)[0]

    teacher = SmartPerturbation(step_size=LARGE_STEP, noise_var=1e-2, k=2)
    clean = model(batch["input_ids"], mask).logits
    torch.manual_seed(7)
    found, *_ = teacher.forward(model, clean, batch["input_ids"], None, mask)
    found.backward()
    same(found.detach(), loss.detach())
    same(model.bert.embeddings.word_embeddings.weight.grad, expected)
    teacher.remove_hooks()
    assert not model.bert.embeddings._forward_hooks


@pytest.mark.parametrize("family", ["gpt2", "t5", "bart"])
def test_models_without_such_a_module_are_perturbed_at_their_input_embeddings(family):
    model, batch = tiny_models.CLASSIFIERS[family](), tiny_models.classification_batch()
    clean = model(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits
    found, size, _ = SmartPerturbation().forward(model, clean, batch["input_ids"], None, batch["attention_mask"])
    words = model.get_input_embeddings().weight
    torch.testing.assert_close(size, model.get_input_embeddings()(batch["input_ids"]).detach().abs().mean())
    found.backward()
    assert words.grad.abs().max() > 0
    assert found > 1e-6


class SanBertNetwork(nn.Module):
    """A Hugging Face encoder inside MT-DNN's calls, which feed the output of its embeddings back in."""

    def __init__(self) -> None:
        super().__init__()
        classifier = tiny_models.bert()
        self.bert, self.scoring_list = classifier.bert, nn.ModuleList([classifier.classifier])

    def forward(
        self, input_ids, token_type_ids, attention_mask, premise_mask=None, hyp_mask=None, task_id=0,
        y_input_ids=None, fwd_type=0, embed=None,
    ):  # fmt: skip
        if fwd_type == 1:
            return self.bert.embeddings(input_ids, token_type_ids)
        ids = None if fwd_type == 2 else input_ids
        outputs = self.bert(ids, attention_mask, token_type_ids, inputs_embeds=embed if fwd_type == 2 else None)
        return self.scoring_list[task_id](outputs.pooler_output)


def test_positions_are_added_once():
    model, given = SanBertNetwork(), inputs()
    clean = model(**given)
    twice = model(**given, fwd_type=2, embed=model(**given, fwd_type=1))
    assert (twice - clean).abs().max() > 1e-3
    still = SmartPerturbation(noise_var=0.0, step_size=0.0)
    loss, *_ = still.forward(model, clean, *given.values())
    assert loss == 0


def test_padding_changes_nothing():
    model, batch = tiny_models.bert().double(), tiny_models.classification_batch()
    found = []
    for given in (batch, tiny_models.with_more_padding(batch)):
        teacher = SmartPerturbation(step_size=LARGE_STEP, noise_var=1e-2, k=2, norm_level=1)
        clean = model(given["input_ids"], given["attention_mask"]).logits
        torch.manual_seed(7)
        found.append(teacher.forward(model, clean, given["input_ids"], None, given["attention_mask"])[0])
    same(*found)


class _Poisoned(torch.autograd.Function):
    @staticmethod
    def forward(ctx, embeds):
        return embeds.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        grad[1, 0, 2] = torch.inf
        return grad


@pytest.mark.parametrize("norm_p", ["inf", "l2"])
def test_a_gradient_that_is_not_finite_is_counted_and_only_its_token_takes_no_step(norm_p):
    given = inputs()
    mask = given["attention_mask"]

    class Poisoned(Network):
        def body(self, embeds, attention_mask, task_id=0):
            return super().body(_Poisoned.apply(embeds), attention_mask, task_id)

    deltas = []
    for kind in (Network, Poisoned):
        model = kind(3, own_calls=True)
        teacher = SmartPerturbation(step_size=LARGE_STEP, noise_var=1e-2, norm_p=norm_p)
        clean = model(**given)
        torch.manual_seed(7)
        seen = []
        handle = model.inner.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0].detach()))
        loss, _, share = teacher.forward(model, clean, *given.values())
        handle.remove()
        assert torch.isfinite(loss)
        assert torch.isfinite(share)
        assert loss > 0
        deltas.append(seen[-1] - model.embed(given["input_ids"], given["token_type_ids"]).detach())
    assert int(teacher.non_finite) == 1
    torch.manual_seed(7)
    _, noise = noise_init(torch.zeros_like(deltas[0]), std=1e-2, mask=mask, return_delta=True)
    order = torch.inf if norm_p == "inf" else 2
    rescaled = noise / (torch.linalg.vector_norm(noise, order, -1, keepdim=True) + 1e-6)
    same(deltas[1][1, 0], rescaled[1, 0])
    deltas[0][1, 0] = deltas[1][1, 0]
    same(*deltas)


def test_criteria_are_called_as_there():
    model, given = Network(3, own_calls=False), inputs()
    clean = model(**given)

    def with_criteria(loss_map):
        torch.manual_seed(7)
        teacher = SmartPerturbation(loss_map=loss_map)
        return teacher.forward(model, clean, *given.values(), task_id=0)[0]

    seen = {}

    def criterion(logits, adv_logits, ignore_index):
        seen.update(logits=logits, adv_logits=adv_logits, ignore_index=ignore_index)
        return logits.sum() - adv_logits.sum()

    assert with_criteria([criterion]) != 0
    assert seen["logits"] is not seen["adv_logits"]
    same(seen["logits"], clean)
    assert seen["ignore_index"] == -1
    same(with_criteria([SymKlCriterion(alpha=3.0)]), 3 * with_criteria([]))


def test_a_criterion_of_a_regression_gets_two_vectors():
    model, given = Network(1, own_calls=False), inputs()

    def mse(logits, adv_logits, ignore_index):
        return nn.functional.mse_loss(logits.squeeze(), adv_logits)

    found = []
    for loss_map in ([mse], []):
        torch.manual_seed(7)
        teacher = SmartPerturbation(loss_map=loss_map)
        found.append(teacher.forward(model, model(**given), *given.values(), task_type=TaskType.Regression)[0])
    same(*found)


def test_it_is_the_preset_of_the_same_name():
    model, batch = tiny_models.bert().double(), tiny_models.classification_batch()
    mask = batch["attention_mask"]
    embeds = model.bert.embeddings(batch["input_ids"])
    torch.manual_seed(7)
    _, delta = noise_init(embeds, std=2.0**-7, mask=mask, return_delta=True)
    config = AdversarialConfig.mtdnn(std=2.0**-7, step_size=0.25, steps=2, modules=("bert.embeddings",))
    objective = AdversarialObjective(model, config)
    expected = objective.forward(batch, delta=[delta]).divergence
    objective.remove_hooks()
    torch.manual_seed(7)
    teacher = SmartPerturbation(noise_var=2.0**-7, step_size=0.25, k=2)
    clean = model(batch["input_ids"], mask).logits
    same(teacher.forward(model, clean, batch["input_ids"], None, mask)[0].detach(), expected.detach())


def test_fp16_autocast_climbs_as_fp32_does():
    given, deltas = inputs(), []
    for enabled in (False, True):
        model = Network(3, own_calls=True).float()
        seen = []
        handle = model.inner.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0].detach()))
        with torch.autocast("cpu", torch.float16, enabled=enabled):
            clean = model(**given)
            torch.manual_seed(7)
            loss, *_ = SmartPerturbation(step_size=LARGE_STEP, noise_var=1e-2).forward(model, clean, *given.values())
        handle.remove()
        loss.backward()
        deltas.append((seen[-1] - model.embed(given["input_ids"], given["token_type_ids"]).detach()).flatten())
    assert torch.cosine_similarity(*deltas, 0) > 0.999


@pytest.mark.parametrize("task", [TaskType.Classification, TaskType.Regression])
def test_clean_logits_may_be_wider(task):
    model, given, found = Network(1 if task == TaskType.Regression else 3, own_calls=True).bfloat16(), inputs(), []
    for dtype in (torch.bfloat16, torch.float32):
        clean = model(**given).to(dtype)
        torch.manual_seed(7)
        found.append(SmartPerturbation().forward(model, clean, *given.values(), task_type=task)[0])
    assert [loss.dtype for loss in found] == [torch.float32] * 2
    assert found[0] > 0
    same(*found)


def test_a_distributed_model_is_seen_through(tmp_path):
    model, given, found = Network(3, own_calls=False), inputs(), []
    with group_of_one(tmp_path):
        for called in (model, nn.parallel.DistributedDataParallel(model)):
            model.zero_grad()
            clean = called(**given)
            torch.manual_seed(7)
            loss, *_ = SmartPerturbation().forward(called, clean, *given.values())
            (clean.square().sum() + loss).backward()
            found.append(tiny_models.Gradients.of(model).flat())
    assert found[0].abs().max() > 0
    same(*found)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"epsilon": 0.0}, "epsilon: expected a number > 0"),
        ({"norm_p": "linf"}, "norm_p: expected one of 'inf', 'l2', 'l1'"),
        ({"k": 0}, "k: expected a number >= 1, got 0"),
        ({"step_size": -1.0}, "step_size: expected a finite number >= 0"),
    ],
)
def test_constants_are_checked(options, words):
    with pytest.raises(ValueError, match=words):
        SmartPerturbation(**options)


def test_calls_are_checked():
    model, given = Network(3, own_calls=True), inputs()
    clean = model(**given)
    with pytest.raises(ValueError, match=r"task_type: expected one of .*Classification.*got 7"):
        SmartPerturbation().forward(model, clean, *given.values(), task_type=7)
    with pytest.raises(ValueError, match="task_id: expected an index into 1 criteria, got 1"):
        SmartPerturbation(loss_map=[SymKlCriterion()]).forward(model, clean, *given.values(), task_id=1)
    with pytest.raises(ValueError, match="model: expected a module or DistributedDataParallel"):
        SmartPerturbation().forward(nn.DataParallel(model), clean, *given.values())
    with pytest.raises(ValueError, match="no module named 'lookup'"):
        SmartPerturbation(modules=("lookup",)).forward(model, clean, *given.values())


@pytest.mark.parametrize("model", ["tiny", pytest.param("bundled", marks=pytest.mark.slow)])
def test_the_example_runs(model, tiny_model, monkeypatch, capsys):
    from examples import mtdnn_drop_in

    own = ["--model", str(tiny_model)] if model == "tiny" else []
    monkeypatch.setattr(sys, "argv", ["mtdnn_drop_in", "--steps", "2", "--batch-size", "4", *own])
    mtdnn_drop_in.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert len(lines) == 2
    assert all(float(line.split("adversarial loss ")[1].split()[0]) > 0 for line in lines)
