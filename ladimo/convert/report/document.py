"""What a report consists of: sections with tables and charts, whatever they are printed as."""

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
    """caption: how to read the chart. numbers: the table that it draws, None where another table of the section has them.
    small: one of a row of similar charts."""

    chart: Element
    caption: str = ""
    numbers: Table | None = None
    small: bool = False


@dataclass(frozen=True, slots=True)
class Fold:
    """Closed until the reader opens it."""

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
    """Of the table of layers. cells: by the layer's number."""

    title: str
    cells: Mapping[int, str]


@dataclass(frozen=True, slots=True)
class MethodView:
    """What a conversion method adds to the report. lead: sentences for its beginning. parameters: which share of each layer
    runs, in place of the rules of the policies. sensitivity, layers, training: figures for those sections. columns: of the
    table of layers."""

    lead: Sequence[str] = ()
    parameters: tuple[str, Figure] | None = None
    sensitivity: Sequence[Figure] = ()
    layers: Sequence[Figure] = ()
    training: Sequence[Figure] = ()
    columns: Sequence[Column] = ()
