"""The counted operations of whole steps against PyTorch's counter on small models, and the figures that are quoted."""

import json
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from alum_kernels import AdversarialConfig, AdversarialObjective, linear_symmetric_kl, linear_symmetric_kl_grad
from alum_kernels.adversarial.linear_head import PROBED_CLASSES
from alum_kernels.backends import native
from alum_kernels.backends.linear_chunks import LinearDivergence, LinearResult

pytest.importorskip("transformers")

from benchmarks import flops
from benchmarks.flops import Forward, forward_of, forward_of_shape
from benchmarks.naive_step import all_positions, class_rows, naive_adversarial_step, standard_step
from benchmarks.shapes import LLAMA_1B, MINILM, ROBERTA_LARGE, SHAPES, Shape, labelled_rows

SMALL = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "attn_implementation": "eager",  # the counter does not know the CPU's fused attention
}  # fmt: skip
CPU = torch.device("cpu")
CONSTANTS = {"alpha": 1.0, "std": 1e-5, "step_size": 1e-3, "epsilon": 1e-5}


def small(task: str, kind: str, published: dict, **options) -> Shape:
    options = {**published, **SMALL, **options}
    return Shape("small", "small", task, kind, options, batch=3, length=10, devices=("cpu",), padded=False)


FAMILIES = {
    "bert classifier": small("classification", "bert", MINILM),
    "roberta classifier": small("classification", "roberta", ROBERTA_LARGE),
    "bert masked LM": small("masked_lm", "bert", MINILM),
    "llama": small("causal_lm", "llama", LLAMA_1B, num_key_value_heads=2, head_dim=12),
}


@pytest.fixture(params=FAMILIES)
def case(request: pytest.FixtureRequest) -> SimpleNamespace:
    shape = FAMILIES[request.param]
    return SimpleNamespace(
        shape=shape,
        model=shape.make_model(CPU),
        batch=shape.make_batch(CPU),
        forward=forward_of_shape(shape),
    )


def counted(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


# against the counter


def test_forward_and_both_backwards(case):
    embeds = case.model.get_input_embeddings()(case.batch["input_ids"]).detach().requires_grad_()
    inputs = {"attention_mask": case.batch["attention_mask"], "inputs_embeds": embeds}
    assert counted(lambda: case.model(**inputs)) == case.forward.total
    logits = case.model(**inputs).logits.sum()
    assert counted(lambda: torch.autograd.grad(logits, embeds, retain_graph=True)) == case.forward.input_backward
    assert counted(logits.backward) == case.forward.full_backward


def test_standard_and_naive_steps(case):
    rows = class_rows if case.shape.task == "classification" else all_positions
    assert counted(lambda: standard_step(case.model, case.batch)) == case.forward.standard
    naive = counted(lambda: naive_adversarial_step(case.model, case.batch, rows, **CONSTANTS))
    assert naive == case.forward.naive


@pytest.mark.parametrize("family", ["bert classifier", "roberta classifier"])
def test_the_library_takes_the_exact_step_of_a_classifier(family):
    shape = FAMILIES[family]
    objective = AdversarialObjective(shape.make_model(CPU), AdversarialConfig.alum_finetuning())
    batch = shape.make_batch(CPU)
    forward = forward_of_shape(shape)
    assert counted(lambda: objective.backward(batch)) == forward.exact(labelled_rows(shape, batch)) == forward.naive


@pytest.fixture
def in_the_op(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], int]:
    """Counts the products inside ``linear_symmetric_kl``, of which the counter sees nothing from outside."""
    module, reason = native.load()
    if module is None:
        pytest.skip(f"only fused kernels form chunks: {reason}")
    total: list[int] = []
    original = LinearDivergence.run

    def watched(call: LinearDivergence) -> LinearResult:
        results: list[LinearResult] = []
        total.append(counted(lambda: results.append(original(call))))
        return results[0]

    monkeypatch.setattr(LinearDivergence, "run", watched)

    def count(run: Callable[[], object]) -> int:
        total.clear()
        run()
        return sum(total)

    return count


def test_products_of_a_linear_divergence(in_the_op):
    rows, columns, hidden = 7, 50, 12
    clean, adv = (torch.randn(rows, hidden, requires_grad=True) for _ in range(2))
    weight = torch.randn(columns, hidden, requires_grad=True)
    product = 2 * hidden * columns * rows
    constants = [tensor.detach() for tensor in (adv, clean, weight)]
    assert in_the_op(lambda: linear_symmetric_kl_grad(*constants, backend="native")) == 3 * product
    assert in_the_op(lambda: linear_symmetric_kl(adv, clean, weight, backend="native").backward()) == 6 * product


@pytest.mark.parametrize("family", ["bert masked LM", "llama"])
def test_the_library_takes_the_exact_step_of_a_language_model(family, in_the_op):
    shape = FAMILIES[family]
    objective = AdversarialObjective(shape.make_model(CPU), AdversarialConfig.alum_finetuning())
    batch, forward = shape.make_batch(CPU), forward_of_shape(shape)
    objective.backward(batch)  # the first batch is run more often, to see what the head is
    assert objective.linear_head is not None
    inside: list[int] = []
    outside = counted(lambda: inside.append(in_the_op(lambda: objective.backward(batch))))
    # of the logits at all positions those of a few classes are left, in three forwards
    probed = 3 * 2 * SMALL["hidden_size"] * PROBED_CLASSES * forward.positions
    assert outside + inside[0] == forward.exact(labelled_rows(shape, batch)) + probed


# the figures


def test_products_with_weights_alone_are_eight_thirds():
    forward = Forward(linear=10**6, attention=0, row=0, positions=512)
    assert forward.bound(0) == pytest.approx(8 / 3)
    assert Forward(linear=0, attention=10**6, row=0, positions=512).bound(0) == pytest.approx(3)


def test_bert_base():
    shape = SHAPES["bert-base-mlm-32x512"]
    forward = forward_of_shape(shape)
    layers = Forward(2 * 32 * 512 * 12 * 12 * 768**2, 4 * 32 * 12 * 512**2 * 768, 0, 32 * 512)
    assert layers.bound(0) == pytest.approx(2.70, abs=1e-9)
    assert (forward.linear - layers.linear, forward.attention) == (2 * 32 * 512 * 768**2, layers.attention)
    assert forward.naive / forward.standard == pytest.approx(2.69, abs=5e-3)
    assert forward.bound(2434) == pytest.approx(2.28, abs=5e-3)


def test_the_published_sizes():
    """Weights of the products, as the models' parameter counts have them."""
    weights = {
        "roberta-large-cls-16x128": 24 * 12 * 1024**2,
        "llama-1b-clm-4x1024": 16 * (2 * 2048**2 + 2 * 2048 * 512 + 3 * 2048 * 8192),
        "minilm-mlm-16x64": 6 * 12 * 384**2 + 384**2,
    }
    for name, count in weights.items():
        forward = forward_of_shape(SHAPES[name])
        head = 2 * 16 * (1024**2 + 3 * 1024) if "roberta" in name else 0
        assert forward.linear - head == 2 * forward.positions * count, name
    assert forward_of_shape(SHAPES["llama-1b-clm-4x1024"]).row == 2 * 2048 * 128256
    assert forward_of_shape(SHAPES["bert-base-mlm-32x512"]).row == 2 * 768 * 30522


def test_a_fraction_of_the_batch():
    forward = Forward(linear=900, attention=100, row=10, positions=20)
    standard, labelled = 3 * (900 + 100) + 3 * 20 * 10, 4
    assert forward.standard == standard
    clean = 3 * (900 + 100) + 3 * labelled * 10
    regulariser = 5 * 900 + 6 * 100 + 9 * labelled * 10
    assert forward.exact(labelled, fraction=0.0) == clean
    assert forward.exact(labelled, fraction=0.25) == clean + regulariser / 4
    assert forward.bound(labelled) == (clean + regulariser) / standard
    assert forward.exact(labelled, compared=20) == clean + 5 * 900 + 6 * 100 + 9 * 20 * 10


def test_half_a_batch_is_half_the_work_of_the_regulariser():
    shape = SHAPES["minilm-cls-16x64"]
    whole = forward_of_shape(shape)
    half = forward_of(shape.configuration(), shape.task, shape.batch // 2, shape.length)
    regulariser = half.exact(8) - half.exact(8, fraction=0.0)
    assert whole.exact(16, fraction=0.5) == whole.exact(16, fraction=0.0) + regulariser


# what is refused, and the program


def test_what_is_not_counted_is_refused():
    import transformers

    with pytest.raises(ValueError, match="got gpt2 for causal_lm"):
        forward_of(transformers.GPT2Config(), "causal_lm", 1, 8)
    with pytest.raises(ValueError, match="got bert for causal_lm"):
        forward_of(transformers.BertConfig(), "causal_lm", 1, 8)


def test_the_program_writes_what_it_prints(tmp_path, capsys):
    path = tmp_path / "flops.json"
    assert flops.main(["--shape", "minilm-cls-16x64", "roberta-large-cls-32x256", "--json", str(path)]) == 0
    written = json.loads(path.read_text())
    assert written["benchmark"] == "flops"
    assert [row["shape"] for row in written["results"]] == ["minilm-cls-16x64", "roberta-large-cls-32x256"]
    printed = capsys.readouterr().out
    for row in written["results"]:
        assert row["bound"] == pytest.approx(row["exact_flops"] / row["standard_flops"])
        assert 1 < row["bound_at_fraction"] < row["bound"]
        assert f"{row['bound']:.2f}x" in printed


def test_an_unknown_shape_is_answered_with_those_that_exist(capsys):
    with pytest.raises(SystemExit):
        flops.main(["--shape", "bert-huge"])
    message = capsys.readouterr().err
    assert "bert-huge" in message
    assert all(name in message for name in SHAPES)
