"""HTML and SVG as trees of elements. The serialiser escapes all text and closes all tags."""

from xml.etree import ElementTree
from xml.etree.ElementTree import Element


def element(tag: str, *children: "Element | str", **attributes: object) -> Element:
    """An element. In names of attributes, `class_` means class, and `stroke_width` means stroke-width. Floats are written with
    four digits. Attributes that are None are left out."""
    made = Element(tag)
    for name, value in attributes.items():
        if value is not None:
            made.set(name.rstrip("_").replace("_", "-"), f"{value:.4g}" if isinstance(value, float) else str(value))
    for child in children:
        if isinstance(child, Element):
            made.append(child)
        elif len(made):
            made[-1].tail = (made[-1].tail or "") + child
        else:
            made.text = (made.text or "") + child
    return made


def to_html(page: Element) -> str:
    return "<!doctype html>\n" + ElementTree.tostring(page, encoding="unicode", method="html") + "\n"


def to_xml(root: Element) -> str:
    return ElementTree.tostring(root, encoding="unicode") + "\n"
