"""Language models trained without their logits: the same numbers as through them, and a word where it cannot be."""

import warnings

import pytest
import tiny_models
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_outputs import MaskedLMOutput

from alum_kernels import AdversarialConfig, AdversarialObjective
from alum_kernels.adversarial.linear_head import LinearHead, find_linear_head

MOVED = AdversarialConfig.alum_finetuning(std=1e-2, epsilon=1e-1, step_size=1e-1, normalize="linf")


def step(model: nn.Module, config: AdversarialConfig, batch: dict[str, Tensor], **options):
    """Output, gradients and telemetry of one step."""
    model.zero_grad()
    objective = AdversarialObjective(model, config, **options)
    output = objective(**batch)
    output.loss.backward()
    objective.remove_hooks()
    return output, tiny_models.Gradients.of(model).flat(), objective.telemetry.read()


def assert_same(fused, logits, tolerance: float) -> None:
    # some models compute their loss in fp32 whatever they are themselves
    torch.testing.assert_close(fused[0].task_loss, logits[0].task_loss, rtol=tolerance, atol=0, check_dtype=False)
    torch.testing.assert_close(fused[0].divergence, logits[0].divergence, rtol=10 * tolerance, atol=0)
    assert (fused[1] - logits[1]).norm() <= 10 * tolerance * logits[1].norm()
    assert fused[2].keys() == logits[2].keys()
    for key, value in fused[2].items():
        assert value == pytest.approx(logits[2][key], rel=100 * tolerance), key


@pytest.mark.parametrize("options", [{}, {"positions": "all", "steps": 2}, {"ascent_divergence": "kl"}], ids=str)
@pytest.mark.parametrize("name", tiny_models.LANGUAGE_MODELS)
def test_every_family_trains_as_through_its_logits(name, options):
    model, batch = tiny_models.language_model(name).double(), tiny_models.masked_lm_batch()
    config = MOVED.replace(signal_check_interval=1, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*trained through its logits")
        fused = step(model, config.replace(fused_head=True), batch)
        logits = step(model, config.replace(fused_head=False), batch)
    assert_same(fused, logits, tolerance=2e-7)
    with pytest.raises(ValueError, match="none are formed where a linear head is fused"):
        _ = fused[0].logits
    assert logits[0].logits.shape[-1] == tiny_models.VOCABULARY


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("options", [{}, {"positions": "all", "steps": 2}], ids=str)
def test_an_encoder_decoder_trains_as_through_its_logits(options, tied):
    """T5 with tied embeddings divides its hidden states before the projection."""
    model = tiny_models.make("t5", "seq2seq", dtype=torch.float64, tie_word_embeddings=tied, scale_decoder_outputs=tied)
    batch = tiny_models.batch("seq2seq")
    batch["decoder_attention_mask"] = (batch["labels"] != -100).long()
    fused = step(model, MOVED.replace(fused_head=True, **options), batch)
    assert_same(fused, step(model, MOVED.replace(fused_head=False, **options), batch), tolerance=2e-7)


def test_a_bias_that_is_added_to_the_logits_is_refused():
    """BART's projection is followed by a buffer of a vocabulary's length."""
    model, batch = tiny_models.make("bart", "seq2seq"), tiny_models.batch("seq2seq")
    with pytest.warns(UserWarning, match="trained through its logits: it adds final_logits_bias"):
        found = step(model, MOVED, batch)
    assert_same(found, step(model, MOVED.replace(fused_head=False), batch), 1e-12)
    with pytest.raises(ValueError, match=r"^fused_head: .*got BartForConditionalGeneration: it adds final_logits_bias"):
        AdversarialObjective(model, MOVED.replace(fused_head=True))


@pytest.mark.parametrize("name", ["bert", "gemma2", "gpt2"])
def test_fp32_on_the_kernels(name):
    model, batch = tiny_models.language_model(name), tiny_models.masked_lm_batch()
    config = MOVED.replace(backend="native")
    assert_same(
        step(model, config.replace(fused_head=True), batch), step(model, config.replace(fused_head=False), batch), 3e-5
    )


def test_both_heads_of_bert_pretraining():
    model, batch = tiny_models.bert_pretraining().double(), tiny_models.pretraining_batch()
    fused = step(model, MOVED.replace(fused_head=True), batch)
    assert_same(fused, step(model, MOVED.replace(fused_head=False), batch), 1e-9)
    # the next-sentence prediction is compared as well: without it the divergence is smaller
    tokens_only = step(model, MOVED.replace(fused_head=True), batch, head="pretraining")
    assert tokens_only[0].divergence == fused[0].divergence
    assert fused[0].outputs.seq_relationship_logits.shape == (4, 2)
    assert fused[0].outputs.prediction_logits is None
    with pytest.raises(ValueError, match="expected 'next_sentence_label'"):
        step(model, MOVED, {name: x for name, x in batch.items() if name != "next_sentence_label"})


def test_the_next_sentence_divergence_is_added():
    model, batch = tiny_models.bert_pretraining(), tiny_models.pretraining_batch()
    with torch.no_grad():
        model.cls.predictions.decoder.weight.zero_()  # tokens are predicted alike whatever the hidden states are
    both = step(model, MOVED, batch)
    assert both[0].divergence > 0
    with torch.no_grad():
        model.cls.seq_relationship.weight.zero_()
    assert step(model, MOVED, batch)[0].divergence == 0


class LargestTensor(TorchDispatchMode):
    """The most elements that an operation's result has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("positions", ["labelled", "all"])
@pytest.mark.parametrize("name", ["bert", "gemma2"])
def test_nothing_is_as_large_as_the_logits(name, positions, monkeypatch):
    monkeypatch.setenv("ALUM_LINEAR_CHUNK_BYTES", str(6 * 1024))
    model, batch = tiny_models.language_model(name), tiny_models.masked_lm_batch(24, 20)
    logits = 24 * 20 * tiny_models.VOCABULARY
    sizes = []
    for fused in (True, False):
        model.zero_grad()
        objective = AdversarialObjective(model, MOVED.replace(fused_head=fused, positions=positions))
        with LargestTensor() as largest:
            objective(**batch).loss.backward()
        objective.remove_hooks()
        sizes.append(largest.elements)
    assert sizes[0] < logits <= sizes[1]


def test_autocast_reaches_the_head():
    model, batch = tiny_models.language_model("bert"), tiny_models.masked_lm_batch()
    results = []
    for fused in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model.zero_grad()
            objective = AdversarialObjective(model, MOVED.replace(fused_head=fused))
            output = objective(**batch)
        output.loss.backward()
        objective.remove_hooks()
        results.append((output, tiny_models.Gradients.of(model).flat()))
    fused, logits = results
    torch.testing.assert_close(fused[0].task_loss.float(), logits[0].task_loss.float(), rtol=2e-2, atol=0)
    torch.testing.assert_close(fused[0].divergence, logits[0].divergence, rtol=0.2, atol=0)
    assert nn.functional.cosine_similarity(fused[1], logits[1], dim=0) > 0.98


def test_a_batch_without_a_labelled_position():
    model, batch = tiny_models.language_model("bert"), tiny_models.masked_lm_batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    output, gradients, _ = step(model, MOVED, batch)
    assert output.loss.item() == 0
    assert (gradients == 0).all()


def test_the_projection_is_left_as_it_was():
    model, batch = tiny_models.language_model("bert"), tiny_models.masked_lm_batch()
    before = model(**batch).logits
    step(model, MOVED, batch)
    assert "forward" not in vars(model.get_output_embeddings())
    assert torch.equal(model(**batch).logits, before)
    objective = AdversarialObjective(model, MOVED)
    with pytest.raises(IndexError):
        objective(**{**batch, "input_ids": batch["input_ids"] + 10**6})
    assert "forward" not in vars(model.get_output_embeddings())


class Doubled(nn.Module):
    """A masked LM that does something to its logits of which its configuration knows nothing."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.model.get_output_embeddings()

    def forward(self, labels: Tensor | None = None, **inputs: Tensor) -> MaskedLMOutput:
        logits = 2 * self.model(**inputs).logits
        loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return MaskedLMOutput(loss=loss, logits=logits)


def test_a_model_that_changes_its_logits_goes_through_them_and_says_so():
    model, batch = Doubled(tiny_models.language_model("bert")), tiny_models.masked_lm_batch()
    with pytest.warns(UserWarning, match="trained through its logits.*its logits are not its output projection's"):
        found = step(model, MOVED, batch, head="masked_lm")
    assert_same(found, step(model, MOVED.replace(fused_head=False), batch, head="masked_lm"), 1e-12)
    with pytest.raises(ValueError, match=r"^fused_head: expected a model .*, got Doubled: its logits are not"):
        step(model, MOVED.replace(fused_head=True), batch, head="masked_lm")


class Quantised(nn.Linear):
    """Stands in for the linear layers of quantisation packages, which are subclasses with a forward of their own."""


def test_what_cannot_be_fused_says_why():
    bert = tiny_models.language_model("bert")
    assert isinstance(find_linear_head(bert), LinearHead)
    assert find_linear_head(nn.Linear(2, 2)) == "it has no output embeddings"
    with pytest.warns(UserWarning, match="there is no fused js"):
        AdversarialObjective(bert, MOVED.replace(divergence="js"))
    with pytest.warns(UserWarning, match="its task loss is the caller's"):
        AdversarialObjective(bert, MOVED, loss=lambda outputs, batch: outputs.logits.sum())
    with pytest.raises(ValueError, match=r"^fused_head: expected .*, got BertForMaskedLM: there is no fused js"):
        AdversarialObjective(bert, MOVED.replace(divergence="js", fused_head=True))
    bert.set_output_embeddings(Quantised(16, tiny_models.VOCABULARY))
    with pytest.warns(UserWarning, match="its output embeddings are a test_linear_head.Quantised"):
        AdversarialObjective(bert, MOVED)
    deberta = tiny_models.language_model("deberta-v2")
    deberta.set_output_embeddings(nn.Linear(16, 16))
    assert "have 16 rows, not a vocabulary's" in find_linear_head(deberta)
    with pytest.raises(ValueError, match=r"^fused_head: expected .*, got BertForSequenceClassification: its head is"):
        AdversarialObjective(tiny_models.bert(), MOVED.replace(fused_head=True))


def test_a_model_with_a_loss_of_its_own_goes_through_its_logits():
    model, batch = tiny_models.language_model("llama"), tiny_models.masked_lm_batch()

    def smoothed(logits: Tensor, labels: Tensor, **_: object) -> Tensor:
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.1)

    model.loss_function = smoothed
    with pytest.warns(UserWarning, match="its loss is not the mean cross-entropy of its labels"):
        found = step(model, MOVED, batch)
    assert_same(found, step(model, MOVED.replace(fused_head=False), batch), 1e-12)


def test_dropout_is_shared_from_the_first_batch_on_also_after_a_refusal():
    """With the same masks in both passes and no noise the two predictions are equal."""
    still = MOVED.replace(std=0.0, epsilon=0.0, steps=0)
    for model in (tiny_models.bert_masked_lm(dropout=0.3), Doubled(tiny_models.bert_masked_lm(dropout=0.3))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            output, _, _ = step(model, still, tiny_models.masked_lm_batch(), head="masked_lm")
        assert output.divergence.item() == 0.0


def test_the_number_of_items_divides_where_it_is_given():
    model, batch = tiny_models.language_model("llama"), {**tiny_models.masked_lm_batch(), "num_items_in_batch": 50}
    fused = step(model, MOVED.replace(fused_head=True), batch)
    assert_same(fused, step(model, MOVED.replace(fused_head=False), batch), 3e-5)


def test_a_compiled_model_is_compiled_for_two_kinds_of_pass():
    torch._dynamo.reset()
    model, batch = tiny_models.language_model("bert"), tiny_models.masked_lm_batch()
    expected = step(model, MOVED.replace(fused_head=True), batch)
    compiled = []

    def count(graph, inputs):
        compiled.append(graph)
        return graph.forward

    objective = AdversarialObjective(model, MOVED.replace(fused_head=True, seed=0))
    model.compile(backend=count)
    for turn in range(4):
        model.zero_grad()
        output = objective(**batch)
        output.loss.backward()
        if turn == 1:
            after_two = len(compiled)
    assert len(compiled) == after_two
    torch.testing.assert_close(output.task_loss, expected[0].task_loss, rtol=1e-5, atol=0)


def test_an_adapter_on_the_head_goes_through_the_logits():
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(
        tiny_models.language_model("llama"), peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    )
    batch = tiny_models.masked_lm_batch()
    with pytest.warns(UserWarning, match=r"its output embeddings are a peft\..*Linear"):
        output, gradients, _ = step(adapted, MOVED, batch, head="causal_lm")
    assert output.divergence > 0
    assert (gradients != 0).any()


def test_an_adapter_elsewhere_leaves_the_head_fused():
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(tiny_models.language_model("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    batch = tiny_models.masked_lm_batch()
    fused = step(adapted, MOVED.replace(fused_head=True), batch, head="causal_lm")
    assert_same(fused, step(adapted, MOVED.replace(fused_head=False), batch, head="causal_lm"), 3e-5)
