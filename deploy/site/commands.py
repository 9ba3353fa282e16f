"""The pages of the commands, made from the parser of `ladimo` and the settings of `ladimo-server`."""

import argparse
import textwrap
from collections.abc import Iterator

from pydantic import SecretStr
from pydantic_core import PydanticUndefined

from deploy.site.tables import cell, table
from ladimo.cli import build_parser
from server.settings import ServerSettings


def ladimo_page() -> str:
    """Every subcommand of `ladimo` with its arguments."""
    parser = build_parser()
    (commands,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    summaries = {action.dest: action.help or "" for action in commands._choices_actions}
    text = f"# ladimo\n\n{parser.description} {parser.epilog}\n"
    for name, command in commands.choices.items():
        words = " ".join(command.format_usage().removeprefix("usage: ").split())
        usage = textwrap.fill(words, 96, subsequent_indent="    ", break_on_hyphens=False, break_long_words=False)
        description = command.description or f"{summaries[name][:1].upper()}{summaries[name][1:]}."
        arguments = table(("argument", "meaning"), _arguments(command))
        text += f"\n## {name}\n\n{cell(description)}\n\n```text\n{usage}\n```\n\n{arguments}"
    return text


def _arguments(command: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    for action in command._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        value = "" if action.nargs == 0 else f" {_value(action)}" if action.option_strings else _value(action)
        names = " or ".join(f"`{flag}{value}`" for flag in action.option_strings) or f"`{value}`"
        meaning = (action.help or "") % {**vars(action), "prog": command.prog}
        yield names, cell(meaning)


def _value(action: argparse.Action) -> str:
    if action.choices is not None and action.metavar is None:
        return "{" + ",".join(str(choice) for choice in action.choices) + "}"
    name = action.metavar or action.dest.upper()
    return name if isinstance(name, str) else " ".join(name)


def server_page() -> str:
    """Every setting of `ladimo-server`: its flag, its environment variable, its default and its meaning."""
    rows = []
    for name, field in ServerSettings.model_fields.items():
        flag = f"--{name.replace('_', '-')}" if name != "model" else "MODEL"
        if field.default is True:
            flag = f"--no-{name.replace('_', '-')}"
        default = (
            "on" if field.default is True else "" if field.default in (None, False, [], PydanticUndefined) else field.default
        )
        assert not isinstance(default, SecretStr)
        shown = f"`{default}`" if default != "" else ""
        rows.append((f"`{flag}`", f"`LADIMO_{name.upper()}`", shown, cell(field.description or "")))
    return (
        "# ladimo-server\n\n"
        "Each setting is a flag, an environment variable, or a line of the TOML file that `--config` names. Flags win over the "
        "environment, and the environment over the file. [Operating](../operating.md) explains them by subject.\n\n"
        + table(("flag", "environment", "default", "meaning"), rows)
    )
