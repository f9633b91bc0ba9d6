"""Readers of training data: formats, round trips, and a place in the message for everything wrong."""

import csv
import io
import json
import string
from pathlib import Path

import pytest
from corpus_files import raises, written
from hypothesis import example, given, settings
from hypothesis import strategies as st
from published_data import PUBLISHED, needs_published

from alum_kernels.corpora import CorpusError, read_labelled, read_paragraphs, read_settings
from alum_kernels.corpora.text import LONGEST_LINE

# formats


def test_a_tsv_without_a_header_has_the_label_first(tmp_path):
    path = written(tmp_path, "a.tsv", '\ufeffyes\tHe said "no\nno \t plain \r\n')
    found = read_labelled(path)
    assert found.texts == [('He said "no',), (" plain ",)]
    assert found.labels == ["yes", "no"]
    assert found.places == [f"{path}:1", f"{path}:2"]
    assert read_labelled(written(tmp_path, "b.TSV", "1\ta\tb")).texts == [("a", "b")]


@pytest.mark.parametrize(
    ("header", "texts"),
    [
        ("label\ttext\tmore", ("b",)),
        ("label\tsentence\tmore", ("b",)),
        ("label\tsentence1\tsentence2", ("b", "c")),
        ("label\tsentence\ttext", ("c",)),
    ],
)
def test_a_header_is_known_by_its_names(tmp_path, header, texts):
    for suffix in (".tsv", ".csv"):
        rows = f"{header}\na\tb\tc\n"
        path = written(tmp_path, f"a{suffix}", rows if suffix == ".tsv" else rows.replace("\t", ","))
        found = read_labelled(path)
        assert (found.texts, found.labels, found.places) == ([texts], ["a"], [f"{path}:2"])


def test_columns_may_be_named(tmp_path):
    path = written(tmp_path, "a.tsv", 'Quality\t#1 String\t#2 String\n1\tone "two\tthree\n')
    found = read_labelled(path, text=("#1 String", "#2 String"), label="Quality")
    assert (found.texts, found.labels) == ([('one "two', "three")], ["1"])
    assert read_labelled(path, text=("#2 String",), label="Quality").texts == [("three",)]
    objects = written(tmp_path, "a.jsonl", '{"score": 0.5, "premise": "x", "text": "not this"}\n')
    assert read_labelled(objects, text=("premise",), label="score").texts == [("x",)]


def test_csv_fields_hold_commas_quotes_and_line_ends(tmp_path):
    path = written(
        tmp_path, "a.csv", 'text,label\r\n"a ""b"", c\nd\r\ne",1\r\nplain, 2\r\n"",x\n'.replace('"",x\n', "")
    )
    found = read_labelled(path)
    assert found.texts == [('a "b", c\nd\r\ne',), ("plain",)]
    assert found.labels == ["1", "2"]
    assert found.places == [f"{path}:2", f"{path}:5"]  # the first example takes three lines


def test_labels_of_objects_are_strings_numbers_or_booleans(tmp_path):
    labels = ['"yes"', "1", "0.5", "true", '" a "']
    lines = "".join(f'{{"sentence1": "a", "sentence2": "", "label": {label}}}\n' for label in labels)
    found = read_labelled(written(tmp_path, "a.jsonl", lines))
    assert found.labels == ["yes", "1", "0.5", "true", "a"]
    assert found.texts[0] == ("a", "")


def test_paragraphs_are_apart_by_blank_lines(tmp_path):
    path = written(tmp_path, "a.txt", "\n\none  two\r\nthree\n \t\n\nfour\u2028five\n")
    assert read_paragraphs(path) == ["one two three", "four five"]
    path = written(tmp_path, "a.jsonl", '{"text": "one\\n two"}\n{"more": 1, "text": "\\ud83d\\ude00"}')
    assert read_paragraphs(path) == ["one\n two", "\U0001f600"]


@needs_published
def test_published_files():
    glue = PUBLISHED / "glue"
    found = read_labelled(glue / "SST-2" / "dev.tsv")
    assert len(found) == 872
    assert found.texts[0] == ("it 's a charming and often affecting journey . ",)
    mrpc = read_labelled(glue / "MRPC" / "dev.tsv", text=("#1 String", "#2 String"), label="Quality")
    assert (len(mrpc), set(mrpc.labels)) == (408, {"0", "1"})
    assert set(read_labelled(glue / "RTE" / "dev.tsv").labels) == {"entailment", "not_entailment"}
    scores = read_labelled(glue / "STS-B" / "dev.tsv", label="score")
    assert (len(scores), max(map(float, scores.labels))) == (1500, 5.0)
    with pytest.raises(CorpusError, match=r"dev\.tsv:1: expected a header .* got 'gj04', '1', ''"):
        read_labelled(glue / "CoLA" / "dev.tsv")


# what is wrong, and where


UTF_16 = "label\ttext\n1\tgood\n"
LONG = "a" * (LONGEST_LINE + 7)
WRONG_BYTES = {
    "not UTF-8": (b"1\tgood\n0\tb\xffd\n", r":2: not UTF-8 text, byte 0xff \(number 4 of the line\)"),
    "cut off": ("1\tgood\n0\té".encode()[:-1], r":2: not UTF-8 text, byte 0xc3"),
    "UTF-16": (UTF_16.encode("utf-16"), r": expected UTF-8 text, got UTF-16; convert it: iconv -f UTF-16 -t UTF-8"),
    "UTF-16, big end": (b"\xfe\xff" + UTF_16.encode("utf-16-be"), ": expected UTF-8 text, got UTF-16"),
    "UTF-16, no mark": (UTF_16.encode("utf-16-le"), ": expected UTF-8 text, got UTF-16"),
    "UTF-32": (UTF_16.encode("utf-32"), ": expected UTF-8 text, got UTF-32"),
    "NUL": (b"1\tgood\n0\tb\0d\n", r":2: expected text, got a NUL \(column 4\)"),
    "long": (f"1\tgood\n0\t{LONG}\n".encode(), rf":2: expected a line of at most {LONGEST_LINE} .*{LONGEST_LINE + 9}$"),
    "empty": (b"", ": expected one example a line, the file is empty"),
    "only a mark": (b"\xef\xbb\xbf", ": expected one example a line, the file is empty"),
}
READERS = {
    "a.tsv": read_labelled,
    "a.csv": read_labelled,
    "a.jsonl": read_labelled,
    "b.jsonl": read_paragraphs,
    "a.txt": read_paragraphs,
    "a.yaml": read_settings,
    "a.json": read_settings,
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("fault", WRONG_BYTES)
def test_no_text(tmp_path, name, fault):
    content, message = WRONG_BYTES[fault]
    path = written(tmp_path, name, content)
    with raises(path, message):
        READERS[name](path)


@pytest.mark.parametrize("name", READERS)
def test_no_file(tmp_path, name, monkeypatch):
    path = tmp_path / name
    with raises(path, ": No such file or directory"):
        READERS[name](path)
    path.mkdir()
    with raises(path, ": expected a file, got a directory"):
        READERS[name](path)
    with pytest.raises(CorpusError, match="null"):
        READERS[name](tmp_path / f"\0{name}")

    def refused(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(args[0]))

    path.rmdir()
    path.write_text("1\ttext\n")
    monkeypatch.setattr("builtins.open", refused)
    with raises(path, ": Permission denied"):
        READERS[name](path)


def test_a_name_says_the_format(tmp_path):
    for reader, names in (
        (read_labelled, r"\*\.tsv, \*\.csv, \*\.jsonl"),
        (read_paragraphs, r"\*\.txt, \*\.jsonl"),
        (read_settings, r"\*\.yaml, \*\.yml, \*\.json"),
    ):
        path = written(tmp_path, "a.xlsx", "x")
        with raises(path, f": expected a file called {names}$"):
            reader(path)


WRONG_ROWS = {
    "more columns": (
        "a.tsv", "1\tgood\n0\tbad\tx\n",
        r":2: expected 2 columns \(as the first line\), got 3: '0 bad x'",
    ),
    "less columns": ("a.tsv", "1\tgood\n0\n", ":2: expected 2 columns .* got 1"),
    "a width": (
        "a.tsv", "a\tb\tc\td\n",
        ":1: expected a header with the columns label and text, .* got 'a', 'b', 'c', 'd'",
    ),
    "a row below a header": ("a.tsv", "label\ttext\n0\tb\tc\n", r":2: expected 2 columns \('label', 'text'\), got 3"),
    "half a header": ("a.tsv", "label\tverse\n0\tb\n", ":1: expected a column text, sentence, .* got 'label', 'verse'"),
    "half a pair": ("a.tsv", "label\tsentence1\n0\tb\n", ":1: expected a column text, sentence, or sentence1 and"),
    "no label column": ("a.tsv", "text\tlab\nb\t0\n", ":1: expected a column label, got 'text', 'lab'"),
    "a column twice": ("a.tsv", "text\tlabel\ttext\nb\t0\tc\n", ":1: expected every column once, got 'text' twice"),
    "only a header": ("a.tsv", "text\tlabel\n", ":1: expected examples below the header, got none"),
    "a blank line": ("a.tsv", "1\tgood\n\n0\tbad\n", ":2: expected an example, got a blank line"),
    "a blank line at the end": ("a.tsv", "1\tgood\n \n", ":2: expected an example, got a blank line"),
    "no label": ("a.tsv", "1\tgood\n \tbad\n", ":2: expected a label, got none"),
    "no text": ("a.tsv", "1\tgood\n0\t \n", ":2: expected text, got none"),
    "old line ends": ("a.tsv", "1\tgood\r0\tbad\r", ":1: column 7: .* got a carriage return by itself"),
    "csv width": ("a.csv", "text,label\na,1\nb,2,3\n", r":3: expected 2 columns \('text', 'label'\), got 3: 'b 2 3'"),
    "csv blank": ("a.csv", "text,label\na,1\n\n", ":3: expected an example, got a blank line"),
    "csv header": ("a.csv", "text,label", ":1: expected examples below the header, got none"),
    "csv columns": ("a.csv", "verse,label\na,1\n", ":1: expected a column text, .* got 'verse', 'label'"),
    "csv label": ("a.csv", 'text,label\n"a\nb",1\nc,""\n', ":4: expected a label, got none"),
    "open quote": ("a.csv", 'text,label\n"a\nb",1\nc,"d\ne\n', ":4: expected a closing quote, got the end of the file"),
    "open quote, later": ("a.csv", 'text,label\n"a\n","b""\n\n', ":3: expected a closing quote"),
    "after a quote": ("a.csv", 'text,label\n"a\n"b,1\n', ":3: column 2: expected a comma or .* got 'b'"),
    "a bare quote": ("a.csv", 'text,label\na "b",1\n', ":2: column 3: expected a field with quotes in it to be quoted"),
    "csv line ends": ("a.csv", "text,label\ra,1\r", ":1: column 11: .* got a carriage return by itself"),
    "bad JSON": (
        "a.jsonl", '{"text": "a", "label": 1}\n{"text": b}\n',
        ":2: expected a JSON object, column 10: Expecting",
    ),
    "two values": ("a.jsonl", '{"text": "a", "label": 1} {}\n', ":1: expected a JSON object, column 27: Extra data"),
    "no object": ("a.jsonl", '["a", 1]\n', r":1: expected a JSON object, got an array: '\[\"a\", 1\]'"),
    "JSON blank": ("a.jsonl", '{"text": "a", "label": 1}\n\n', ":2: expected a JSON object, got a blank line"),
    "a key twice": (
        "a.jsonl", '{"text": "a", "text": "b", "label": 1}',
        ":1: expected every key once, got 'text' twice",
    ),
    "null": ("a.jsonl", '{"text": "a", "label": null}', ":1: field label: expected a label, got null"),
    "a list": ("a.jsonl", '{"text": "a", "label": [1]}', ":1: field label: expected a label, got an array"),
    "NaN": ("a.jsonl", '{"text": "a", "label": NaN}', ":1: expected a JSON number, got NaN"),
    "infinity": ("a.jsonl", '{"text": "a", "label": 1e999}', ":1: expected a number below 1.8e308, got '1e999'"),
    "a long number": ("a.jsonl", f'{{"text": "a", "label": {"9" * 9999}}}', ":1: .*4300 digits"),
    "depth": ("a.jsonl", "[" * 200_000, ":1: expected JSON that nests less deeply"),
    "no string": ("a.jsonl", '{"text": 1, "label": 1}', ":1: field text: expected a string, got a number"),
    "half a character": (
        "a.jsonl", '{"text": "a\\ud800", "label": 1}',
        r":1: field text: expected characters, got .ud800",
    ),
    "an escaped NUL": (
        "a.jsonl", '{"text": "a\\u0000", "label": 1}',
        r":1: field text: expected characters, got .u0000",
    ),
    "missing": (
        "a.jsonl", '{"text": "a", "label": 1}\n{"text": "a", "lab": 1}',
        ":2: expected a column label, got 'text', 'lab'",
    ),
    "another text": (
        "a.jsonl", '{"text": "a", "label": 1}\n{"sentence": "a", "label": 1}',
        ":2: expected a column text, got 'sentence', 'label'",
    ),
    "nothing there": ("a.jsonl", "{}", ":1: expected a column text, sentence, .* got none"),
    "blank paragraphs": ("a.txt", "\n \n", ": expected paragraphs, got blank lines"),
    "no text field": ("b.jsonl", '{"txt": "a"}', ":1: expected a field 'text', got 'txt'"),
    "no text in it": ("b.jsonl", '{"text": " "}', ":1: field text: expected text, got none"),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG_ROWS)
def test_what_cannot_be_used_is_named_by_its_place(tmp_path, fault):
    name, content, message = WRONG_ROWS[fault]
    path = written(tmp_path, name, content)
    with raises(path, message):
        READERS[name](path)


def test_a_named_column_is_expected(tmp_path):
    path = written(tmp_path, "a.tsv", "1\tgood\n")
    with raises(path, ":1: expected a column verse, and label, got '1', 'good'"):
        read_labelled(path, text=("verse",))
    wide = written(tmp_path, "wide.csv", ",".join(f"c{index}" for index in range(50)) + "\n")
    with raises(wide, ":1: .*'c19' and 30 more$"):
        read_labelled(wide)
    for wrong in ("text", ("a", "b", "c")):
        with pytest.raises(ValueError, match="text: expected a tuple of one or two names"):
            read_labelled(path, text=wrong)


# round trips

CHARACTERS = st.characters(exclude_characters="\0", exclude_categories=("Cs",))
ANY_TEXT = st.text(CHARACTERS, max_size=30).filter(lambda text: text.strip())
LABELS = st.text(CHARACTERS, min_size=1, max_size=8).filter(lambda text: text == text.strip())
EXAMPLES = st.lists(st.tuples(ANY_TEXT, LABELS), min_size=1, max_size=6)
PAIRS = st.lists(st.tuples(ANY_TEXT, st.text(CHARACTERS, max_size=20), LABELS), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("corpora")


@given(PAIRS, st.sampled_from([("\r\n", csv.QUOTE_MINIMAL), ("\r\n", csv.QUOTE_ALL), ("\n", csv.QUOTE_ALL)]))
@example([("a\r\nb\rc", '"', "1"), (",", "", "2")], ("\r\n", csv.QUOTE_MINIMAL))
@settings(max_examples=60)
def test_csv_as_the_csv_module_writes_it(folder, rows, dialect):
    """Not with line feeds as line ends and few quotes: it then leaves carriage returns bare."""
    end, quoting = dialect
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator=end, quoting=quoting)
    writer.writerows([("sentence1", "sentence2", "label"), *rows])
    path = written(folder, "a.csv", buffer.getvalue())
    found = read_labelled(path)
    assert found.texts == [row[:2] for row in rows]
    assert found.labels == [row[2] for row in rows]
    lines = buffer.getvalue().split("\n")
    starts = [int(place.rpartition(":")[2]) for place in found.places]
    assert len(set(starts)) == len(rows)
    for start, (text, _, _) in zip(starts, rows, strict=True):
        first = text.split("\n")[0].replace('"', '""')
        assert lines[start - 1].removeprefix('"').startswith(first.removesuffix("\r"))


@given(EXAMPLES, st.booleans())
@settings(max_examples=60)
def test_objects_as_the_json_module_writes_them(folder, rows, ascii_only):
    lines = (json.dumps({"text": text, "label": label}, ensure_ascii=ascii_only) for text, label in rows)
    content = "\n".join(lines)
    path = written(folder, "a.jsonl", content)
    found = read_labelled(path)
    assert found.texts == [(text,) for text, _ in rows]
    assert found.labels == [label for _, label in rows]
    assert found.places == [f"{path}:{number}" for number in range(1, len(rows) + 1)]
    assert read_paragraphs(path) == [text for text, _ in rows]


NO_TABS = st.characters(exclude_characters="\0\t\r\n", exclude_categories=("Cs",))
CELLS = st.text(NO_TABS, min_size=1, max_size=30).filter(lambda text: text.strip() and text[0] != "\ufeff")


@given(
    st.lists(st.tuples(CELLS, CELLS.map(str.strip)), min_size=1, max_size=6),
    st.booleans(),
    st.sampled_from(["\n", "\r\n"]),
)
@settings(max_examples=60)
def test_tsv_as_it_stands(folder, rows, header, end):
    lines = ["label\ttext"] if header else []
    lines += [f"{label}\t{text}" for text, label in rows]
    known = {"label", "text", "sentence", "sentence1", "sentence2"}
    if not header and known.intersection(rows[0]):
        return
    found = read_labelled(written(folder, "a.tsv", end.join(lines)))
    assert found.texts == [(text,) for text, _ in rows]
    assert found.labels == [label for _, label in rows]


# anything else

PIECES = [
    b"text",
    b"label",
    b"sentence",
    b'"',
    b",",
    b"\t",
    b"\n",
    b"\r\n",
    b"\r",
    b"{",
    b"}",
    b"[",
    b"]",
    b":",
    b": ",
    b"- ",
    b"\\u",
    b"d800",
    b"\x00",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"1",
    b"1e9999",
    b"null",
    b"&a ",
    b"*a",
    b"<<: ",
    b"!!int ",
    b"? ",
    b"%",
    b"!!timestamp ",
    b"2026-99-99",
    b"!!binary ",
    b"|\n ",
    b"#",
    b"'",
    b"---\n",
    b"0b",
    b"1:2",
    b"!!omap ",
    b"!!set ",
]
NOISE = st.one_of(
    st.binary(max_size=40),
    st.lists(st.sampled_from(PIECES), max_size=14).map(b"".join),
    st.text(string.printable, max_size=40).map(str.encode),
)


@pytest.mark.parametrize("name", READERS)
@given(content=NOISE)
@settings(max_examples=150)
def test_any_bytes_are_read_or_refused(folder, name, content):
    path = written(folder, name, content)
    refusal = None
    try:
        found = READERS[name](path)
    except CorpusError as error:
        refusal = str(error)
    if refusal is None:
        assert len(found) > 0 or name in ("a.yaml", "a.json")
    else:
        assert refusal.startswith(f"{path}:")
