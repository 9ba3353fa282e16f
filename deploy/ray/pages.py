"""Joins the metrics pages of all replicas to one, in which every series has the label `replica`."""

import re
from collections.abc import Mapping

SAMPLE = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? (.+)")


def join_pages(pages: Mapping[str, str]) -> str:
    """One page in Prometheus's text format. `pages`: by the replica's name, each in this format."""
    families: dict[str, tuple[list[str], list[str]]] = {}  # comments and samples by the first comment, which names the family
    for replica, page in sorted(pages.items()):
        comments, samples = families.setdefault("", ([], []))
        for line in page.splitlines():
            if line.startswith("# HELP "):
                comments, samples = families.setdefault(line, ([], []))
            if line.startswith("#"):
                if line not in comments:
                    comments.append(line)
            elif sample := SAMPLE.fullmatch(line):
                name, labels, value = sample.groups()
                inside = f'replica="{replica}"' + (f",{labels}" if labels else "")
                samples.append(f"{name}{{{inside}}} {value}")
    return "".join(f"{line}\n" for comments, samples in families.values() for line in (*comments, *samples))
