"""The page: machines, then a section for every benchmark that a file holds."""

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from . import (
    accuracy,
    estimators,
    gpu_check,
    growth,
    linear_head,
    machines,
    memory,
    ops,
    pass_costs,
    quality,
    resources,
    step,
)
from .files import ResultFile
from .markup import Html, findings, joined, table, tag

SECTIONS: dict[str, ModuleType] = {
    "ops": ops,
    "growth": growth,
    "step": step,
    "pass-costs": pass_costs,
    "linear-head": linear_head,
    "quality": quality,
    "estimators": estimators,
    "memory": memory,
    "accuracy": accuracy,
    "resources": resources,
    "gpu-check": gpu_check,
}
STYLE = Path(__file__).with_name("style.css")
UNKNOWN = "Other benchmarks"


def page(files: Sequence[ResultFile]) -> str:
    """The whole document, as text; it needs no script and loads nothing."""
    kinds = {kind: [file for file in files if file.kind == kind] for kind in SECTIONS}
    sections = [("machines", machines.TITLE, machines.body(files))]
    sections += [(kind, SECTIONS[kind].TITLE, _section(SECTIONS[kind], own)) for kind, own in kinds.items() if own]
    others = [file for file in files if file.kind not in SECTIONS]
    if others:
        sections.append(("other", UNKNOWN, _unknown(others)))
    links = tag("nav", *(tag("a", title, href=f"#{name}") for name, title, _ in sections), aria_label="Sections")
    dates = sorted({file.date for file in files})
    places = list(dict.fromkeys(file.place for file in files))
    measured = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    lead = (
        f"{len(files)} result files, measured {measured} on {'; '.join(places)}. Every figure comes from these files. "
        "Green: this library is ahead. Red: it is behind."
    )
    head = tag("header", tag("h1", "alum_kernels, measured"), tag("p", lead, class_="lead"), links)
    body = joined(tag("section", tag("h2", title), content, id=name) for name, title, content in sections)
    style = STYLE.read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>alum_kernels, measured</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n{head}\n{tag('main', body)}\n</body>\n</html>\n"
    )


def _section(section: ModuleType, files: Sequence[ResultFile]) -> Html:
    parts = [tag("p", section.INTRO, class_="intro")]
    if len(files) > 1:
        parts.append(_side_by_side(section, files))
    for file in files:
        source = tag("p", f"{file.name}, commit {file.commit}, {file.date}", class_="source")
        parts.append(
            tag("article", tag("h3", file.place), source, findings(section.findings(file)), section.body(file))
        )
    return joined(parts)


def _side_by_side(section: ModuleType, files: Sequence[ResultFile]) -> Html:
    """A column a file: the figures that several machines or commits share, beside each other."""
    columns = [section.compared(file) for file in files]
    names = dict.fromkeys(name for column in columns for name in column)
    lines = [(name, *(column.get(name, "–") for column in columns)) for name in names]
    head = ("", *(f"{file.place}, {file.commit}, {file.date} ({file.name})" for file in files))
    return tag("article", tag("h3", "Side by side"), table(head, lines))


def _unknown(files: Sequence[ResultFile]) -> Html:
    intro = tag("p", "This page does not know these benchmarks; it lists what their files hold.", class_="intro")
    lines = [
        (file.kind, file.name, ", ".join(f"{key} ({_size(value)})" for key, value in file.content.items()))
        for file in files
    ]
    return joined((intro, table(("benchmark", "file", "keys"), lines, text_columns=3)))


def _size(value: object) -> str:
    if isinstance(value, (dict, list)):
        return f"{len(value)} {'keys' if isinstance(value, dict) else 'elements'}"
    return str(value)[:40]
