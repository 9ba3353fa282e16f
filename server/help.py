"""The layout of `ladimo-server --help`."""

import argparse
from collections.abc import Iterable
from typing import Any

# Placeholders for values, in place of the Python types that pydantic-settings would show.
PLACEHOLDERS = {
    "int": "N",
    "{int,auto}": "N|auto",
    "{int,prefill}": "N|prefill",
    "float": "X",
    "str": "TEXT",
    "Path": "PATH",
    "SecretStr": "KEY",
    "list[SecretStr]": "KEY",
    "list[str]": "TEXT",
    "Mapping[str,Tier]": "JSON",
}
NO_DEFAULTS = (" (default: None)", " (default: [])", " (default: False)", " (default: True)")


class HelpFormatter(argparse.HelpFormatter):
    """Each entry shows a flag, the kind of its value, and its default if there is one. The usage line lists no flags."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, **{**options, "max_help_position": 30, "width": 110})

    def add_usage(
        self, usage: str | None, actions: Iterable[argparse.Action], groups: Iterable[Any], prefix: str | None = None
    ) -> None:
        super().add_usage(f"{self._prog} MODEL [flags]", (), (), prefix)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return str(action.metavar)
        if "(default: True)" in (action.help or ""):
            return ", ".join(action.option_strings)
        flag = action.option_strings[-1 if action.dest == "help" else 0]
        if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
            return flag
        placeholder = str(action.metavar)
        return f"{flag} {PLACEHOLDERS.get(placeholder, placeholder)}"

    def _expand_help(self, action: argparse.Action) -> str:
        text = super()._expand_help(action)
        for nothing in NO_DEFAULTS:
            text = text.removesuffix(nothing)
        return text
