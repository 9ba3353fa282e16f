"""Multiple-choice tasks and minimal pairs, read from plain files into one form and scored by log-probability.

An item has a few pairs of context and continuation, and one of them is right. The model chooses the continuation with the
highest log-probability after its context. Prompts are those of lm-evaluation-harness, without examples.
"""

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ladimo.convert.data.calibration import Encoder, read_text
from ladimo.convert.evaluation.likelihoods import Continuation, Likelihood


class PlainTabs(csv.Dialect):
    """Fields are separated by tabs. Quotation marks are text like any other."""

    delimiter = "\t"
    quoting = csv.QUOTE_NONE
    lineterminator = "\n"


SUFFIXES: dict[str, type[csv.Dialect] | None] = {
    ".jsonl": None,
    ".csv": csv.excel,
    ".tsv": PlainTabs,
}  # the form of a table; None: JSON lines
PROTOCOL = (
    "An option's score is the sum of the log-probabilities of its tokens after the context. BOS is put first if the tokenizer "
    "has one; otherwise EOS, if the context is empty. acc_norm divides scores by the option's number of characters. Long "
    "contexts lose their beginning. Items with an option that does not fit the model's context are skipped."
)


@dataclass(frozen=True, slots=True)
class Choices:
    """One item. options: pairs of context and continuation. gold: the number of the right one. A single pair asks whether the
    model would write the continuation."""

    options: tuple[tuple[str, str], ...]
    gold: int


@dataclass(frozen=True, slots=True)
class Task:
    name: str
    file: Path
    form: str
    items: tuple[Choices, ...]


@dataclass(frozen=True, slots=True)
class EncodedTask:
    """A task in one model's tokens. items: those that fit the model's context. continuations: the options of these, in order.
    truncated: the number of continuations with a shortened context."""

    task: Task
    items: tuple[Choices, ...]
    continuations: tuple[Continuation, ...]
    truncated: int


@dataclass(frozen=True, slots=True)
class Form:
    """A form of files, recognised by the fields of their records. read: makes an item from a record and the task's name."""

    name: str
    fields: tuple[str, ...]
    read: Callable[[Mapping[str, Any], str], Choices]


def _pair(record: Mapping[str, Any], task: str) -> Choices:
    return _choices([("", _text(record, name)) for name in ("sentence_good", "sentence_bad")], 0)


def _arc(record: Mapping[str, Any], task: str) -> Choices:
    context = _text(record, "query") + "\nAnswer:"
    return _choices([(context, f" {choice}") for choice in _texts(record, "choices")], record["gold"], "gold")


def _piqa(record: Mapping[str, Any], task: str) -> Choices:
    context = f"Question: {_text(record, 'goal')}\nAnswer:"
    return _choices([(context, f" {_text(record, name)}") for name in ("sol1", "sol2")], record["label"], "label")


def _winogrande(record: Mapping[str, Any], task: str) -> Choices:
    continuation = f" {_text(record, 'continuation')}"
    return _choices([(context, continuation) for context in _texts(record, "context_options")], record["gold"], "gold")


def _openbookqa(record: Mapping[str, Any], task: str) -> Choices:
    context, answers = _text(record, "Question Stem"), re.split(r"\s*\(([A-Z])\)\s+", " " + _text(record, "Choices"))
    letters = answers[1::2]
    key = _text(record, "Answer Key")
    if key not in letters:
        raise ValueError(f"Answer Key: {key!r} is none of the choices {letters}")
    return _choices([(context, f" {choice}") for choice in answers[2::2]], letters.index(key))


def _mmlu(record: Mapping[str, Any], task: str) -> Choices:
    subject = re.sub(r"_(test|dev|val)$", "", task).replace("_", " ")
    lines = [f"{letter}. {_text(record, f'choice{number}')}" for number, letter in enumerate("ABCD")]
    head = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    context = head + "\n".join([_text(record, "question").strip(), *lines, "Answer:"])
    return _choices([(context, f" {letter}") for letter in "ABCD"], record["answer"], "answer")


def _lambada(record: Mapping[str, Any], task: str) -> Choices:
    context, space, last = _text(record, "text").rpartition(" ")
    if not space:
        raise ValueError("text: must have at least two words")
    return _choices([(context, f" {last}")], 0)


FORMS = (
    Form("minimal pairs", ("sentence_good", "sentence_bad"), _pair),
    Form("ARC", ("query", "choices", "gold"), _arc),
    Form("PIQA", ("goal", "sol1", "sol2"), _piqa),
    Form("WinoGrande", ("context_options", "continuation", "gold"), _winogrande),
    Form("OpenBookQA", ("Question Stem", "Choices", "Answer Key"), _openbookqa),
    Form("MMLU", ("question", "choice0", "choice1", "choice2", "choice3", "answer"), _mmlu),
    Form("LAMBADA", ("text",), _lambada),
)


def task_files(paths: Sequence[Path]) -> list[Path]:
    """The task files. A directory stands for the task files in it. Raises ValueError if a directory has none."""
    files: list[Path] = []
    for path in paths:
        inside = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES) if path.is_dir() else [path]
        if not inside:
            raise ValueError(f"{path}: has no task file ({', '.join(SUFFIXES)})")
        files += inside
    return files


def read_task(file: Path, limit: int | None = None) -> Task:
    """The first `limit` items of a file; None: all. Its form is recognised by the fields of its first record. The labels of a
    .jsonl file may be in a file beside it, NAME-labels.lst, with one number per line (PIQA).

    Raises ValueError with the name of the file and, if known, of the line and the field.
    """
    if file.suffix not in SUFFIXES:
        raise ValueError(f"{file}: not a task file; supported: {', '.join(SUFFIXES)}")
    form: Form | None = None
    items: list[Choices] = []
    for line, record in _records(file, SUFFIXES[file.suffix]):
        try:
            form = form or _form(record)
            items.append(form.read(record, file.stem))
        except KeyError as error:
            raise ValueError(f"{file}:{line}: {error.args[0]} is missing") from None
        except ValueError as error:
            raise ValueError(f"{file}:{line}: {error}") from error
        if len(items) == limit:
            break
    if form is None:
        raise ValueError(f"{file}: has no items")
    return Task(file.stem, file, form.name, tuple(items))


def encode_task(task: Task, encoder: Encoder) -> EncodedTask:
    """Encode the items that fit the model's context. Raises ValueError if none does."""
    items: list[Choices] = []
    continuations: list[Continuation] = []
    truncated = 0
    for item in task.items:
        encoded = [_continuation(encoder, *option) for option in item.options]
        fitting = [one for one, _ in encoded if one is not None]
        if len(fitting) == len(encoded):
            items.append(item)
            continuations += fitting
            truncated += sum(shortened for _, shortened in encoded)
    if not items:
        raise ValueError(f"{task.file}: no item fits the model's context of {encoder.block} tokens")
    return EncodedTask(task, tuple(items), tuple(continuations), truncated)


def score_task(items: Sequence[Choices], likelihoods: Sequence[Likelihood]) -> dict[str, float | None]:
    """The scores of a task.

    accuracy: the share of items whose right option is the most likely one. For items with a single option, it is the share that
    greedy decoding would write. acc_norm: the same with log-probabilities per character. Each has its standard error.
    perplexity: only for items with a single option, per option.
    """
    right, right_norm, losses = [], [], []
    place = 0
    for item in items:
        own = likelihoods[place : place + len(item.options)]
        place += len(item.options)
        if len(own) == 1:
            right.append(own[0].greedy)
            losses.append(-own[0].log_prob)
            continue
        scores = [one.log_prob for one in own]
        per_character = [score / len(text.removeprefix(" ")) for score, (_, text) in zip(scores, item.options, strict=True)]
        right.append(scores.index(max(scores)) == item.gold)
        right_norm.append(per_character.index(max(per_character)) == item.gold)
    assert place == len(likelihoods)
    accuracy, stderr = _mean(right)
    acc_norm, acc_norm_stderr = _mean(right_norm)
    return {
        "accuracy": accuracy,
        "stderr": stderr,
        "acc_norm": acc_norm,
        "acc_norm_stderr": acc_norm_stderr,
        "perplexity": math.exp(sum(losses) / len(losses)) if losses else None,
    }


def _mean(hits: Sequence[bool]) -> tuple[float | None, float | None]:
    """The share of hits and its standard error."""
    if not hits:
        return None, None
    share = sum(hits) / len(hits)
    return share, math.sqrt(share * (1 - share) / (len(hits) - 1)) if len(hits) > 1 else None


def _continuation(encoder: Encoder, context: str, text: str) -> tuple[Continuation | None, bool]:
    """The pair in tokens, and whether its context was shortened. None if the continuation alone is too long.

    Both are encoded together, so that the tokens at their border are those of continuous text. Spaces at the end of the context
    count as part of the continuation.
    """
    kept = context.rstrip()
    whole = encoder.encode([context + text]).tolist()
    start = min(len(encoder.encode([kept])), len(whole) - 1) if kept else 0
    first = encoder.bos if encoder.bos is not None or kept else encoder.tokenizer.eos_token_id
    if first is None and start == 0:
        raise ValueError(f"{encoder.directory}: the tokenizer has neither BOS nor EOS to put before a text")
    prefix = () if first is None else (int(first),)
    room = encoder.block + 1 - len(prefix)  # the last token is only predicted
    if len(whole) - start > room - (0 if prefix else 1):
        return None, False
    cut = max(0, len(whole) - room)
    return Continuation((*prefix, *whole[cut:]), len(prefix) + start - cut), cut > 0


def _form(record: Mapping[str, Any]) -> Form:
    for form in FORMS:
        if all(name in record for name in form.fields):
            return form
    known = "; ".join(f"{form.name} ({', '.join(form.fields)})" for form in FORMS)
    raise ValueError(f"unknown form, with the fields {', '.join(map(str, record))}; known: {known}")


def _records(file: Path, table: type[csv.Dialect] | None) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield the records of a file, each with the number of its last line."""
    text = read_text(file)
    if table is not None:
        reader = csv.DictReader(io.StringIO(text, newline=""), dialect=table, strict=True)
        try:
            for row in reader:
                yield reader.line_num, row
        except csv.Error as error:
            raise ValueError(f"{file}:{reader.line_num}: {error}") from error
        return
    labels_file = file.with_name(f"{file.stem}-labels.lst")
    labels = read_text(labels_file).split() if labels_file.exists() else None
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if labels is not None and len(labels) != len(lines):
        raise ValueError(f"{labels_file}: has {len(labels)} labels for {len(lines)} items")
    for place, (number, line) in enumerate(lines):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}:{number}: not valid JSON ({error})") from error
        if not isinstance(record, dict):
            raise ValueError(f"{file}:{number}: not a JSON object")
        yield number, record if labels is None else {**record, "label": labels[place]}


def _choices(options: Sequence[tuple[str, str]], gold: object, field: str = "") -> Choices:
    number = int(gold) if isinstance(gold, str) and gold.strip().isdecimal() else gold
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(options):
        raise ValueError(f"{field}: must be the number of one of the {len(options)} choices, got {gold!r}")
    if not all(text.strip() for _, text in options):
        raise ValueError("a choice is empty")
    return Choices(tuple(options), number)


def _text(record: Mapping[str, Any], field: str) -> str:
    value = record[field]
    if not isinstance(value, str):
        raise ValueError(f"{field}: must be text, got {value!r}")
    return value


def _texts(record: Mapping[str, Any], field: str) -> list[str]:
    value = record[field]
    if not isinstance(value, list) or not value or not all(isinstance(entry, str) for entry in value):
        raise ValueError(f"{field}: must be a list of texts, got {value!r}")
    return value
