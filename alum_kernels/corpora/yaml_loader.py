"""PyYAML's safe loader, which refuses a key that stands twice and has a line for every fault."""

from typing import Any

import yaml

from alum_kernels.corpora.text import line_of, shown

_MAPPING, _STRING, _MERGE = (f"tag:yaml.org,2002:{name}" for name in ("map", "str", "merge"))


class YamlError(ValueError):
    """A YAML text that cannot be used; ``line`` counts from 1."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(message)
        self.line = line


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """The parent's, whose keys differ. (Once built, merged keys would stand twice by right.)"""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            known = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None
            if known is not None and known in seen:
                raise _fault(key, f"expected every key once, got {shown(key.value)} twice")
            seen.add(known)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """The parent's, whose constructors raise whatever a bad date, number or tag makes them."""
        try:
            return super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            if isinstance(error, YamlError):
                raise
            raise _fault(node, f"expected a value of the kind {node.tag.rpartition(':')[2]}: {error}") from error


def load_mapping(text: str) -> dict[str, Any]:
    """The one document of a text, a mapping whose keys are strings.

    Raises:
        YamlError: it is none.
    """
    try:
        loader = _Loader(text)
        try:
            return _mapping_of(loader)
        finally:
            loader.dispose()
    except RecursionError as error:
        raise YamlError("expected YAML that nests less deeply", 1) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        words = " ".join(filter(None, (error.context, error.problem)))
        raise YamlError(f"expected YAML: {words}", 1 if mark is None else mark.line + 1) from error
    except yaml.reader.ReaderError as error:
        raise YamlError(
            f"expected YAML, got the character {error.character:#x}, which may not stand in it",
            line_of(text, error.position),
        ) from error


def _mapping_of(loader: _Loader) -> dict[str, Any]:
    node = loader.get_single_node()
    if node is None:
        raise YamlError("expected a mapping, got nothing", 1)
    if node.tag != _MAPPING or not isinstance(node, yaml.MappingNode):
        kinds = {yaml.SequenceNode: "a list", yaml.ScalarNode: "a single value", yaml.MappingNode: f"a {node.tag}"}
        raise _fault(node, f"expected a mapping (key: value), got {kinds[type(node)]}")
    for key, _ in node.value:
        if key.tag not in (_STRING, _MERGE):
            what = shown(key.value) if isinstance(key, yaml.ScalarNode) else "a collection"
            raise _fault(key, f"expected keys that are strings, got {what}, which YAML takes for no string; quote it")
    return loader.construct_document(node)


def _fault(node: yaml.Node, message: str) -> YamlError:
    return YamlError(message, node.start_mark.line + 1)
