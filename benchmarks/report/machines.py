"""Where the figures were measured: every fact of the result files about their machines."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .files import ResultFile
from .markup import Html, escaped, facts, joined, table, tag

TITLE = "Machines"
OF_A_RUN = ("date", "commit", "load_average")
"""Facts that are another in every run; they stand in the table of files."""


def flat(known: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Facts as words, those of an inner object by both names; what is not known is left away."""
    for name, value in known.items():
        words = f"{prefix}{name.replace('_', ' ')}"
        if isinstance(value, Mapping):
            yield from flat(value, f"{words}: ")
        elif isinstance(value, (list, tuple)):
            if value:
                yield words, ", ".join(map(str, value))
        elif value is not None and value != "":
            yield words, _quantity(name, value)


def _quantity(name: str, value: Any) -> str:
    if name.endswith("_bytes") and isinstance(value, (int, float)):
        return f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"
    return str(value)


def body(files: Sequence[ResultFile]) -> Html:
    """An article a machine: what all of its files agree on, then a line a file with the rest."""
    places: dict[str, list[ResultFile]] = {}
    for file in files:
        places.setdefault(file.place, []).append(file)
    return joined(_machine(place, own) for place, own in places.items())


def _machine(place: str, files: Sequence[ResultFile]) -> Html:
    known = [dict(flat({k: v for k, v in file.machine.items() if k not in OF_A_RUN})) for file in files]
    names = dict.fromkeys(name for facts_of in known for name in facts_of)
    values = {name: list(dict.fromkeys(f[name] for f in known if name in f)) for name in names}
    shared = [(name, " | ".join(found)) for name, found in values.items()]
    packages = [(n.removeprefix("packages: "), v) for n, v in shared if n.startswith("packages: ")]
    native = [(n, v) for n, v in shared if n.startswith("native")]
    rest = [(n, v) for n, v in shared if (n, v) not in native and not n.startswith("packages: ")]
    lines = [
        (file.name, file.kind, file.date, tag("code", file.commit), escaped(file.machine.get("load_average", "–")))
        for file in files
    ]
    return tag(
        "article",
        tag("h3", place),
        facts(rest),
        tag("details", tag("summary", "Versions and native module"), facts([*packages, *native])),
        table(("file", "benchmark", "date", "commit", "load before"), lines, text_columns=4),
    )
