"""GLUE tasks and named entities: their files and tables, and the file and line of what is wrong in them."""

import pytest
from glue_files import cola_files, task_files
from published_data import PUBLISHED, needs_published

from alum_kernels.corpora import CorpusError
from examples.glue_tasks import TASKS, read_task

HEADERS = {
    "rte": "index\tsentence1\tsentence2\tlabel",
    "mrpc": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
    "stsb": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
    "sst2": "sentence\tlabel",
}


def test_cola_has_no_header_and_literal_quotes(tmp_path):
    rows = '\ufeffgj04\t1\t\tHe said "no.\nbc01\t0\t*\tThem "ran\'s.\r\n'
    data = read_task("cola", task_files(tmp_path, rows, "gj04\t1\t\tYes.\n"))
    assert data.train.texts == [('He said "no.',), ("Them \"ran's.",)]
    assert data.train.labels == [1, 0]
    assert data.dev.texts == [("Yes.",)]
    assert data.classes == ("0", "1")


def test_rte_labels_are_names(tmp_path):
    rows = f'{HEADERS["rte"]}\n0\tA "b\tc\tnot_entailment\n1\td\te" f\tentailment\n'
    data = read_task("rte", task_files(tmp_path, rows, rows))
    assert data.train.texts == [('A "b', "c"), ("d", 'e" f')]
    assert data.train.labels == [1, 0]


def test_mrpc_header_has_a_byte_order_mark(tmp_path):
    rows = f'\ufeff{HEADERS["mrpc"]}\n1\t12\t13\tone "two\tthree\n0\t14\t15\tfour\tfive\n'
    data = read_task("mrpc", task_files(tmp_path, rows, rows))
    assert data.train.texts == [('one "two', "three"), ("four", "five")]
    assert data.train.labels == [1, 0]


def test_stsb_scores_are_numbers(tmp_path):
    row = "0\tnews\tf\t2012\t0\tnone\tnone\t{}\t{}\t{}\n"
    rows = HEADERS["stsb"] + "\n" + row.format('a "b', "c", "3.800") + row.format("d", "e", "0")
    data = read_task("stsb", task_files(tmp_path, rows, rows))
    assert data.train.texts[0] == ('a "b', "c")
    assert data.train.labels == [3.8, 0.0]
    assert data.classes == ()


def test_columns_are_found_by_name_in_any_order(tmp_path):
    data = read_task(
        "sst2", task_files(tmp_path, "more\tlabel\tsentence\nx\t1\tgood film \n", "sentence\tlabel\nbad\t0\n")
    )
    assert data.train.texts == [("good film ",)]
    assert data.train.labels == [1]
    assert data.dev.labels == [0]


def test_entities_are_sentences_of_words_and_tags(tmp_path):
    train = '\n\nA\tO\n"\tO\nhepatitis\tB-Disease\nB\tI-Disease\n\n\nfine\tO'
    data = read_task("ner", task_files(tmp_path, train, "ok\tO\n", "devel.tsv"))
    assert data.classes == ("B-Disease", "I-Disease", "O")
    assert data.train.words == [("A", '"', "hepatitis", "B"), ("fine",)]
    assert data.train.tags == [(2, 2, 0, 1), (2,)]
    assert data.dev.words == [("ok",)]


def test_the_folder_may_hold_the_published_one(tmp_path):
    for place in ("CoLA", "glue/CoLA", "."):
        folder = tmp_path / place.replace("/", "-")
        task_files(folder / place, "s\t1\t\tHere.\n", "s\t0\t\tThere.\n")
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
        read_task(task, task_files(tmp_path, train, train, TASKS[task].dev_files[0]))


def test_a_tag_unknown_in_training_is_named_by_its_line(tmp_path):
    folder = task_files(tmp_path, "a\tO\nb\tB-X\n", "a\tO\n\nb\tO\nc\tB-Y\n", "devel.tsv")
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
def test_published_labels():
    assert sum(read_task("cola", PUBLISHED).dev.labels) == 721
    assert sum(read_task("mrpc", PUBLISHED).dev.labels) == 279
    assert read_task("ner", PUBLISHED).classes == ("B-Disease", "I-Disease", "O")
