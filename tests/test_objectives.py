"""The training step against the same step written out by hand, and what its passes may and may not touch."""

from types import SimpleNamespace

import pytest
import tiny_models
import torch
from climbed import Climbed
from tiny_models import BagOfEmbeddings, Gradients
from torch import Tensor, nn

from alum_kernels import AdversarialConfig, AdversarialObjective, AdversarialOutput
from alum_kernels.backends.reference import noise_init as reference_noise
from alum_kernels.backends.reference import projected_ascent as reference_ascent
from alum_kernels.backends.reference import symmetric_kl as reference_kl

STILL = AdversarialConfig(std=0.0, step_size=0.0, epsilon=0.0)
MOVED = AdversarialConfig(std=1e-2, step_size=2e-2, epsilon=2e-2, normalize="linf")


def task_loss(logits: Tensor, batch: dict) -> Tensor:
    if batch["labels"].is_floating_point():
        return nn.functional.mse_loss(logits.squeeze(-1), batch["labels"].to(logits.dtype))
    return nn.functional.cross_entropy(logits, batch["labels"])


def bag(config: AdversarialConfig, *, head: str = "classification", dtype=torch.float64, **options):
    model = BagOfEmbeddings(**options).to(dtype)
    objective = AdversarialObjective(model, config.replace(modules=("embed",)), head=head, loss=task_loss)
    return model, objective


def divergence_rows(adv_logits: Tensor, logits: Tensor, divergence: str, gradient: str = "full") -> Tensor:
    """Rows of a divergence, differentiable by the convention, from the reference formulas."""
    if divergence == "squared_error":
        clean = logits.detach() if gradient == "detach_clean" else logits
        return ((adv_logits - clean) ** 2).sum(-1)
    clean = logits if gradient == "full" else logits.detach()
    adv = adv_logits.detach() if gradient == "detach_targets" else adv_logits
    rows, _ = reference_kl.loss(adv, clean, None, divergence=divergence, inv_temperature=1.0)
    if gradient != "detach_targets":
        return rows
    # p - q as the constant gradient of both sides
    difference = (torch.softmax(adv_logits, -1) - torch.softmax(logits, -1)).detach()
    linear = (difference * (adv_logits - logits)).sum(-1)
    return rows + linear - linear.detach()


def step_by_hand(model: BagOfEmbeddings, batch: dict, config: AdversarialConfig, seed: Tensor, head: str) -> Tensor:
    """Loss of one step in plain PyTorch: embeddings, noise, K gradient steps, and the final comparison."""
    std, step_size, epsilon = torch.tensor([config.std, config.step_size, config.epsilon]).tolist()  # as fp32 has them
    mask = batch["attention_mask"]
    embeds = model.embed(batch["input_ids"])
    logits = model.body(embeds, mask)
    clean = embeds.detach()
    delta = reference_noise.initial_delta(
        clean.shape,
        seed,
        clean.dtype,
        std=std,
        mask=mask,
        distribution=config.distribution,
        stream=0,
        sample_offset=0,
    )
    inner, outer = config.ascent_divergence, config.divergence
    if head == "regression":
        inner = outer = "squared_error"
    for _ in range(config.steps):
        point = (clean + delta).requires_grad_()
        total = divergence_rows(model.body(point, mask), logits.detach(), inner).sum()
        (grad,) = torch.autograd.grad(total, point)
        _, delta, _ = reference_ascent.projected_ascent(
            clean,
            grad,
            delta,
            step_size=step_size,
            epsilon=epsilon,
            norm=config.norm,
            normalize=config.normalize,
            level=config.level,
            mask=mask,
        )
    rows = divergence_rows(model.body(embeds + delta, mask), logits, outer, config.gradient)
    return task_loss(logits, batch) + config.alpha * rows.mean()


CASES = {p: getattr(AdversarialConfig, p)() for p in ("alum_pretraining", "alum_finetuning", "smart", "mtdnn", "r3f")}
CASES |= {f"steps-{steps}": MOVED.replace(steps=steps) for steps in range(4)}
CASES |= {
    "l2-sequence": MOVED.replace(norm="l2", normalize="l2", level="sequence", epsilon=0.1, steps=2),
    "l2-batch": MOVED.replace(norm="l2", normalize="l2", level="batch", epsilon=0.2),
    "uniform-sign": MOVED.replace(distribution="uniform", normalize="sign", alpha=10.0),
    "kl-detach-clean": MOVED.replace(divergence="kl", gradient="detach_clean", steps=2),
    "js": MOVED.replace(divergence="js", ascent_divergence="js"),
    "squared-hellinger": MOVED.replace(divergence="squared_hellinger", ascent_divergence="squared_hellinger"),
    "mixed": MOVED.replace(divergence="kl", ascent_divergence="js", alpha=0.5),
}


@pytest.mark.parametrize("head", ["classification", "regression"])
@pytest.mark.parametrize("case", CASES)
def test_a_step_is_the_one_written_by_hand(case, head):
    config = CASES[case]
    regression = head == "regression"
    batch = tiny_models.regression_batch() if regression else tiny_models.classification_batch()
    model, objective = bag(config, head=head, labels=1 if regression else 3)
    seed = torch.tensor([977])
    output = objective.forward(batch, seed=seed)
    output.loss.backward()
    ours = Gradients.of(model)
    model.zero_grad()
    if regression and config.gradient == "detach_targets":
        config = config.replace(gradient="full")
    expected = step_by_hand(model, batch, config, seed, head)
    expected.backward()
    torch.testing.assert_close(output.loss, expected, rtol=1e-12, atol=0)
    for name, grad in Gradients.of(model).values.items():
        torch.testing.assert_close(
            ours.values[name], grad, rtol=1e-9, atol=1e-14, msg=lambda m, name=name: f"{name}: {m}"
        )
    torch.testing.assert_close(output.task_loss + objective.config.alpha * output.divergence, output.loss.detach())
    assert output.divergence > 0


@pytest.mark.parametrize("config", [MOVED, MOVED.replace(steps=0), MOVED.replace(steps=3, dropout="independent")])
def test_call_and_backward_agree_bit_for_bit(config):
    batch = tiny_models.classification_batch()
    results = []
    for run in ("call", "backward", "own backward"):
        model = tiny_models.bert(0.2)
        objective = AdversarialObjective(model, config)
        torch.manual_seed(5)
        if run == "call":
            output = objective(**batch)
            output.loss.backward()
            loss = output.loss.detach()
        else:
            seen = []
            own = (lambda total, seen=seen: (seen.append(total), total.backward())) if run == "own backward" else None
            figures = objective.backward(batch, backward=own)
            assert set(figures) == {"loss", "task_loss", "divergence"}
            assert not any(value.requires_grad for value in figures.values())
            assert len(seen) == (run == "own backward")
            loss = figures["loss"]
        results.append((loss, Gradients.of(model).flat()))
    for loss, grads in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(grads, results[0][1])


def test_scale_multiplies_the_gradient_and_not_the_figures():
    batch, results = tiny_models.classification_batch(), []
    for scale in (1.0, torch.tensor(0.25)):
        model, objective = bag(MOVED)
        figures = objective.backward(batch, scale=scale)
        results.append((figures["loss"], Gradients.of(model).flat()))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1] / 4, results[1][1])


def test_the_gradient_is_linear_in_alpha():
    batch, grads = tiny_models.classification_batch(), {}
    for alpha in (0.0, 1.0, 10.0):
        model, objective = bag(MOVED.replace(alpha=alpha))
        objective.backward(batch)
        grads[alpha] = Gradients.of(model).flat()
    model = BagOfEmbeddings().double()
    task_loss(model(batch["input_ids"], batch["attention_mask"]), batch).backward()
    torch.testing.assert_close(grads[0.0], Gradients.of(model).flat(), rtol=1e-12, atol=1e-16)
    difference = grads[1.0] - grads[0.0]
    assert difference.norm() > 1e-6
    torch.testing.assert_close(grads[10.0] - grads[0.0], 10 * difference, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("name", ["bert", "t5"])
def test_the_ascent_computes_no_parameter_gradient(name, steps):
    model = tiny_models.CLASSIFIERS[name]()
    calls = dict.fromkeys((parameter for parameter, _ in model.named_parameters()), 0)

    def count(grad: Tensor, parameter: str) -> None:
        calls[parameter] += 1

    for parameter, tensor in model.named_parameters():
        tensor.register_hook(lambda grad, parameter=parameter: count(grad, parameter))
    objective = AdversarialObjective(model, MOVED.replace(steps=steps, signal_check_interval=1))
    output = objective(**tiny_models.classification_batch())
    assert set(calls.values()) == {0}
    assert all(parameter.grad is None for parameter in model.parameters())
    output.loss.backward()
    assert set(calls.values()) == {1}
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_ascent_climbs_the_sum_so_that_the_batch_size_does_not_matter(monkeypatch):
    climbed = Climbed(monkeypatch)
    batch, seed = tiny_models.classification_batch(), torch.tensor([3])
    _, objective = bag(MOVED.replace(normalize="none"))
    objective.forward(batch, seed=seed)
    for sample in range(4):
        one = {key: value[sample : sample + 1] for key, value in batch.items()}
        objective.forward(one, seed=seed, sample_offset=sample)
    whole, *parts = climbed.gradients
    assert whole.abs().amax() > 0
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("cut", [1, 2, 3])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_split_batch_gives_the_gradient_of_the_whole(cut, level):
    batch, seed = tiny_models.classification_batch(), torch.tensor([3])
    model, objective = bag(MOVED.replace(steps=2, alpha=10.0, level=level))
    objective.forward(batch, seed=seed, sample_offset=40).loss.backward()
    whole = Gradients.of(model).flat()
    model.zero_grad()
    for part, offset in ((slice(0, cut), 40), (slice(cut, 4), 40 + cut)):
        inputs = {key: value[part] for key, value in batch.items()}
        output = objective.forward(inputs, seed=seed, sample_offset=offset)
        (output.loss * len(inputs["labels"]) / 4).backward()
    torch.testing.assert_close(Gradients.of(model).flat(), whole, rtol=1e-9, atol=1e-14)


def test_the_noise_of_two_steps_and_of_two_offsets_differs():
    batch, seed = tiny_models.classification_batch(), torch.tensor([3])
    _, objective = bag(MOVED)
    assert objective(**batch).divergence != objective(**batch).divergence
    here, there = (objective.forward(batch, seed=seed, sample_offset=offset).divergence for offset in (0, 4))
    assert here != there


def test_a_checkpoint_goes_on_with_the_noise_where_it_stopped():
    batch = tiny_models.classification_batch()
    _, whole = bag(MOVED)
    fresh = whole.state_dict()
    losses, states = [], []
    for _ in range(4):
        losses.append(whole(**batch).loss)
        states.append(whole.state_dict())
    for done, state in ((0, fresh), (1, states[0]), (3, states[2])):
        _, resumed = bag(MOVED)
        resumed(**batch)
        resumed.load_state_dict(state)
        assert resumed.state_dict()["steps"] == done
        assert torch.equal(torch.stack([resumed(**batch).loss for _ in range(4 - done)]), torch.stack(losses[done:]))
    _, other = bag(MOVED.replace(seed=1))
    assert other(**batch).loss != losses[0]


def test_shared_dropout_makes_the_still_divergence_exactly_zero():
    batch = tiny_models.classification_batch()
    model = tiny_models.bert(0.3)
    for steps in (0, 1, 2):
        torch.manual_seed(7)
        assert AdversarialObjective(model, STILL.replace(steps=steps))(**batch).divergence == 0
        after = torch.get_rng_state()
        torch.manual_seed(7)
        model(**batch)
        assert torch.equal(torch.get_rng_state(), after)
        independent = AdversarialObjective(model, STILL.replace(steps=steps, dropout="independent"))
        assert independent(**batch).divergence > 1e-3


def test_dropout_off_runs_without_it_and_restores_the_modes():
    batch, model = tiny_models.classification_batch(), tiny_models.bert(0.3)
    model.bert.pooler.eval()
    before = [module.training for module in model.modules()]
    output = AdversarialObjective(model, STILL.replace(dropout="off"))(**batch)
    assert [module.training for module in model.modules()] == before
    assert output.divergence == 0
    assert torch.equal(output.logits, model.eval()(**batch).logits)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_masked_lm_counts_labelled_positions_only(backend):
    model, batch = tiny_models.bert_masked_lm(), tiny_models.masked_lm_batch()
    seen = []
    model.register_forward_hook(lambda module, args, output: seen.append(output.logits.detach()))
    output = AdversarialObjective(model, MOVED.replace(backend=backend, fused_head=False))(**batch)
    labelled = batch["labels"] != -100
    logits, _, adv_logits = (side[labelled].double() for side in seen)
    expected = divergence_rows(adv_logits, logits, "symmetric_kl").mean()
    torch.testing.assert_close(output.divergence.double(), expected, rtol=2e-6, atol=0)
    everywhere = divergence_rows(seen[2].double(), seen[0].double(), "symmetric_kl").mean()
    assert (everywhere - expected).abs() > 1e-2 * expected


def test_a_batch_without_labels_is_refused():
    for model, why in (
        (tiny_models.bert(), ", since the model computed no loss;"),
        (tiny_models.bert_masked_lm(), r" \(B, S\) for a masked_lm head,"),
    ):
        objective = AdversarialObjective(model, MOVED)
        with pytest.raises(ValueError, match=f"^batch: expected 'labels'{why} got input_ids"):
            objective(**tiny_models.tokens())
    model = tiny_models.bert_masked_lm()
    objective = AdversarialObjective(model, MOVED, loss=lambda outputs, batch: outputs.logits.sum())
    with pytest.raises(ValueError, match=r"^batch: expected 'labels' \(B, S\) for a masked_lm head"):
        objective(**tiny_models.tokens())


def test_what_cannot_be_wrapped_says_so():
    with pytest.raises(ValueError, match="Linear has no input embeddings to perturb"):
        AdversarialObjective(nn.Linear(2, 2), MOVED, head="classification")
    with pytest.raises(ValueError, match="no head recognised for BagOfEmbeddings"):
        AdversarialObjective(BagOfEmbeddings(), MOVED)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_a_step_never_waits_for_the_device(backend):
    batch = tiny_models.classification_batch()
    waits = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
                waits.append(func)
            return func(*args, **(kwargs or {}))

    _, objective = bag(MOVED.replace(steps=2, signal_check_interval=1, backend=backend), dtype=torch.float32)
    with Watch():
        output = objective(**batch)
        output.loss.backward()
        assert not waits
        output.loss.item()
    assert waits


def test_output_logits_of_every_kind_of_output():
    logits, zero = torch.randn(2, 3), torch.zeros(())
    for outputs in (logits, {"logits": logits}, SimpleNamespace(logits=logits)):
        assert AdversarialOutput(zero, zero, zero, outputs).logits is logits
