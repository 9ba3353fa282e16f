"""The parts of a report: sections with tables and charts, independent of the output format."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element


@dataclass(frozen=True, slots=True)
class Table:
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True, slots=True)
class Figure:
    """caption: explains the chart. numbers: a table of the chart's numbers; None if another table of the section has them.
    small: whether it is one of several similar charts in a row."""

    chart: Element
    caption: str = ""
    numbers: Table | None = None
    small: bool = False


@dataclass(frozen=True, slots=True)
class Fold:
    """Blocks that are hidden until the reader opens them."""

    summary: str
    blocks: Sequence[Table | Figure]


@dataclass(frozen=True, slots=True)
class Section:
    title: str
    text: Sequence[str] = ()
    blocks: Sequence[Table | Figure | Fold] = ()


@dataclass(frozen=True, slots=True)
class Tile:
    label: str
    value: str
    notes: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Document:
    title: str
    lead: Sequence[str]
    tiles: Sequence[Tile] = ()
    sections: Sequence[Section] = ()


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the table of layers. cells: by the layer's number."""

    title: str
    cells: Mapping[int, str]


@dataclass(frozen=True, slots=True)
class MethodView:
    """A conversion method's part of the report. lead: sentences for the beginning. parameters: text and figure about the share
    of each layer that runs; None: the rules of the policies are shown. sensitivity, layers, training: figures for these
    sections. columns: further columns of the table of layers."""

    lead: Sequence[str] = ()
    parameters: tuple[str, Figure] | None = None
    sensitivity: Sequence[Figure] = ()
    layers: Sequence[Figure] = ()
    training: Sequence[Figure] = ()
    columns: Sequence[Column] = ()
