"""Evaluation sets: every form of file is read, log-probabilities are transformers', padding and batching change nothing."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ladimo.checkpoint import read_config, read_json, read_policies, write_json
from ladimo.cli import main
from ladimo.convert.data.calibration import Encoder
from ladimo.convert.evaluate_checkpoint import evaluate_checkpoint
from ladimo.convert.evaluation.likelihoods import Continuation, Likelihood, likelihoods
from ladimo.convert.evaluation.tasks import Choices, encode_task, read_task, score_task, task_files
from ladimo.convert.streamed_model import StreamedModel
from ladimo.hf import LadimoLlamaForCausalLM
from tests.factories import BOS_ID
from tests.ladimo.convert.conftest import Made

CPU = torch.device("cpu")
DATA = Path(__file__).parents[4] / "shared/data"
PAIRS = [{"sentence_good": f"she sees {n} x", "sentence_bad": f"she see {n} xyz"} for n in range(5)]
MMLU = "question,choice0,choice1,choice2,choice3,answer\n"
FILES = {
    "blimp.jsonl": "\n".join(map(json.dumps, PAIRS)),
    "arc.jsonl": json.dumps({"query": "Question: q?", "choices": ["a", "bc", "d", "e"], "gold": 2}) + "\n\n",
    "piqa.jsonl": '{"goal": "g", "sol1": "one", "sol2": "two"}\n{"goal": "h", "sol1": "x ", "sol2": "y"}\n',
    "piqa-labels.lst": "1\n0\n",
    "wino.jsonl": json.dumps({"context_options": ["Ann so Ann", "Ann so Bea"], "continuation": "won.", "gold": 1}),
    "lambada.jsonl": json.dumps({"text": 'He said "no,\n\nI am Shane'}),
    "obqa.tsv": (
        "ID\tQuestion Stem\tChoices\tComplete Question\tAnswer Key\n"
        '8-3\tA "dark place is\t(A) a cave (B) the sun (lit) (C) noon (D) day\tA...\tC\n'
    ),
    "high_school_physics_test.csv": MMLU + '"What is\n""x""?",1,2,"3, 4",5,3\n',
}
MMLU_CONTEXT = (
    "The following are multiple choice questions (with answers) about high school physics.\n\n"
    'What is\n"x"?\nA. 1\nB. 2\nC. 3, 4\nD. 5\nAnswer:'
)
READ = {
    "blimp.jsonl": ("minimal pairs", Choices((("", "she sees 0 x"), ("", "she see 0 xyz")), 0)),
    "arc.jsonl": ("ARC", Choices(tuple(("Question: q?\nAnswer:", f" {text}") for text in ("a", "bc", "d", "e")), 2)),
    "piqa.jsonl": ("PIQA", Choices((("Question: g\nAnswer:", " one"), ("Question: g\nAnswer:", " two")), 1)),
    "wino.jsonl": ("WinoGrande", Choices((("Ann so Ann", " won."), ("Ann so Bea", " won.")), 1)),
    "lambada.jsonl": ("LAMBADA", Choices((('He said "no,\n\nI am', " Shane"),), 0)),
    "obqa.tsv": (
        "OpenBookQA",
        Choices(tuple(('A "dark place is', f" {text}") for text in ("a cave", "the sun (lit)", "noon", "day")), 2),
    ),
    "high_school_physics_test.csv": ("MMLU", Choices(tuple((MMLU_CONTEXT, f" {letter}") for letter in "ABCD"), 3)),
}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sets")
    for name, text in FILES.items():
        (directory / name).write_text(text)
    return directory


@pytest.fixture(scope="module")
def model(dense_dir: Path) -> StreamedModel:
    return StreamedModel(dense_dir, CPU)


@pytest.mark.parametrize("name", READ)
def test_every_form_is_read(sets: Path, name: str) -> None:
    task = read_task(sets / name)
    assert (task.form, task.items[0]) == READ[name]
    assert task.name == name.rsplit(".", 1)[0]


def test_limit_and_directories(sets: Path) -> None:
    assert len(read_task(sets / "blimp.jsonl").items) == 5
    assert read_task(sets / "blimp.jsonl", 2).items == read_task(sets / "blimp.jsonl").items[:2]
    assert [file.name for file in task_files([sets, sets / "arc.jsonl"])] == [*sorted(READ), "arc.jsonl"]


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("a.jsonl", "", "has no items"),
        ("a.jsonl", '{"text": "a b"}\n{"text": ', "a.jsonl:2: not valid JSON"),
        ("a.jsonl", "[1]", "a.jsonl:1: not a JSON object"),
        ("a.jsonl", '{"question": "q"}', "a.jsonl:1: unknown form, with the fields question; known: minimal pairs"),
        ("a.jsonl", '{"text": "word"}', "a.jsonl:1: text: must have at least two words"),
        ("a.jsonl", '{"text": 3}', "a.jsonl:1: text: must be text, got 3"),
        ("a.jsonl", '{"query": "q", "choices": ["a"], "gold": 1}', "gold: must be the number of one of the 1 choices, got 1"),
        ("a.jsonl", '{"query": "q", "choices": ["a"], "gold": true}', "got True"),
        ("a.jsonl", '{"query": "q", "choices": "ab", "gold": 0}', "choices: must be a list of texts"),
        ("a.jsonl", '{"query": "q", "choices": ["a", " "], "gold": 0}', "a choice is empty"),
        ("a.jsonl", '{"goal": "g", "sol1": "one", "sol2": "two"}', "a.jsonl:1: label is missing"),
        ("a.jsonl", json.dumps(PAIRS[0]) + '\n{"sentence_good": "x"}', "a.jsonl:2: sentence_bad is missing"),
        ("a.csv", MMLU + "q,1,2,3,4,5\n", "a.csv:2: answer: must be the number of one of the 4 choices, got '5'"),
        ("a.csv", MMLU + "q,1,2\n", "a.csv:2: choice2: must be text, got None"),
        ("a.tsv", FILES["obqa.tsv"].replace("\tC\n", "\tE\n"), "a.tsv:2: Answer Key: 'E' is none of the choices"),
        ("a.txt", "x", "not a task file"),
    ],
)
def test_wrong_files_are_refused_by_line_and_field(tmp_path: Path, name: str, text: str, named: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        read_task(tmp_path / name)
    assert named in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none.jsonl: no such file"):
        read_task(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="has no task file"):
        task_files([tmp_path])
    (tmp_path / "piqa.jsonl").write_text(FILES["piqa.jsonl"])
    (tmp_path / "piqa-labels.lst").write_text("1\n")
    with pytest.raises(ValueError, match="piqa-labels.lst: has 1 labels for 2 items"):
        read_task(tmp_path / "piqa.jsonl")


def test_encoding(sets: Path, dense_dir: Path) -> None:
    """One token per byte: BOS, the context, and the continuation with the space between them."""
    encoder = Encoder(dense_dir, read_config(dense_dir))
    (first, second) = encode_task(read_task(sets / "wino.jsonl"), encoder).continuations
    assert first == Continuation((BOS_ID, *encoder.encode(["Ann so Ann won."]).tolist()), 11)
    assert encoder.tokenizer.decode(second.ids[second.start :]) == " won."
    pair = encode_task(read_task(sets / "blimp.jsonl", 1), encoder).continuations
    assert [(one.ids[0], one.start, len(one.ids)) for one in pair] == [(BOS_ID, 1, 13), (BOS_ID, 1, 14)]


def test_long_contexts_are_cut_and_long_continuations_skipped(tmp_path: Path, dense_dir: Path) -> None:
    encoder = Encoder(dense_dir, read_config(dense_dir))  # a context of 256 tokens, the 257th can still be predicted
    records = [
        {"query": "q" * 400, "choices": ["yes", "no"], "gold": 0},
        {"query": "q", "choices": ["x" * 255, "n"], "gold": 1},
        {"query": "q", "choices": ["x" * 256, "n"], "gold": 1},
    ]
    (tmp_path / "arc.jsonl").write_text("\n".join(map(json.dumps, records)))
    encoded = encode_task(read_task(tmp_path / "arc.jsonl"), encoder)
    assert (len(encoded.items), encoded.truncated) == (2, 3)
    for one, text in zip(encoded.continuations, (" yes", " no", " " + "x" * 255, " n"), strict=True):
        assert one.ids[0] == BOS_ID
        assert encoder.tokenizer.decode(one.ids[one.start :]) == text
        assert len(one.ids) <= 257
    (tmp_path / "arc.jsonl").write_text(json.dumps(records[2]))
    with pytest.raises(ValueError, match="no item fits the model's context of 256 tokens"):
        encode_task(read_task(tmp_path / "arc.jsonl"), encoder)


def random_continuations(count: int, seed: int = 0) -> list[Continuation]:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    found = []
    for _ in range(count):
        ids = tuple(torch.randint(256, (draw(2, 34),), generator=generator).tolist())
        found.append(Continuation(ids, draw(1, len(ids))))
    return found


@pytest.mark.parametrize("chunk", [1, 100, 10_000])
@pytest.mark.parametrize("pass_bytes", [1, 2**30])
def test_likelihoods_are_transformers_whatever_the_batches(made: Made, chunk: int, pass_bytes: int) -> None:
    """Per policy, each sequence alone and unpadded in the reference; some inputs are equal, some tokens are the likeliest."""
    reference = AutoModelForCausalLM.from_pretrained(made.out)
    assert isinstance(reference, LadimoLlamaForCausalLM)
    asked = random_continuations(25)
    with torch.no_grad():
        likely = int(reference(torch.tensor([asked[0].ids[:-1]])).logits[0, -1].argmax())
    asked += [Continuation((*asked[0].ids[:-1], token), len(asked[0].ids) - 1) for token in (likely, 5, 6)]
    policies = read_policies(made.out, read_config(made.out))
    chosen = [policies[name].layers for name in ("full", "fast")]
    found = likelihoods(StreamedModel(made.out, CPU), None, asked, chosen, chunk, pass_bytes, logit_rows=7)
    for rules in chosen:
        reference.set_policy(rules)
        for one, value in zip(asked, found[rules], strict=True):
            with torch.no_grad():
                logp = reference(torch.tensor([one.ids[:-1]])).logits[0].log_softmax(-1)[one.start - 1 :]
            targets = torch.tensor(one.ids[one.start :])
            assert value.log_prob == pytest.approx(logp.gather(1, targets[:, None]).sum().item(), abs=1e-3)
            assert value.greedy == bool((logp.argmax(-1) == targets).all())
    assert [value.greedy for value in found[chosen[0]][-3:]] == [True, False, False]


def test_scores() -> None:
    """Three items: the longest continuation wins per character, the right one outright, the wrong one."""
    options = (("", "ab"), ("", " abcd"))
    items = [Choices(options, 1), Choices(options, 0), Choices(options, 0)]
    values = [Likelihood(p, False) for p in (-2.0, -3.0, -1.0, -8.0, -9.0, -2.0)]
    scores = score_task(items, values)
    assert scores["accuracy"] == pytest.approx(1 / 3)
    assert scores["acc_norm"] == pytest.approx(2 / 3)
    assert scores["stderr"] == scores["acc_norm_stderr"] == pytest.approx(math.sqrt(1 / 3 * 2 / 3 / 2))
    assert scores["perplexity"] is None
    single = [Choices((("a", " b"),), 0)] * 2
    scores = score_task(single, [Likelihood(-1.0, True), Likelihood(-3.0, False)])
    assert (scores["accuracy"], scores["acc_norm"]) == (0.5, None)
    assert scores["perplexity"] == pytest.approx(math.exp(2))
    assert score_task(single[:1], [Likelihood(-1.0, True)])["stderr"] is None


def test_evaluate_adds_tasks_to_the_contracts_object(made: Made, sets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The small model's context of 32 bytes leaves no room for the questions of PIQA's items but for their answers."""
    command = ["evaluate", str(made.out), "--text", str(made.text), "--tokens", "60"]
    tasks = [str(sets / "blimp.jsonl"), str(sets / "piqa.jsonl"), str(sets / "lambada.jsonl")]
    assert main([*command, "--task", *tasks, "--items", "4", "--json"]) == 0
    printed: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert list(printed) == ["model", "text", "tokens", "dense", "policies", "tasks"]
    pairs, piqa, lambada = printed["tasks"]
    assert [(task["task"], task["form"], task["items"]) for task in printed["tasks"]] == [
        ("blimp", "minimal pairs", 4),
        ("piqa", "PIQA", 2),
        ("lambada", "LAMBADA", 1),
    ]
    names = [entry["policy"] for entry in printed["policies"]]
    for task in printed["tasks"]:
        assert [entry["policy"] for entry in task["policies"]] == names
        assert 0 <= task["dense"]["accuracy"] <= 1
    assert pairs["dense"]["perplexity"] is None
    assert lambada["dense"]["perplexity"] > 1
    assert piqa["dense"]["acc_norm_stderr"] is not None
    assert main([*command, "--task", tasks[0]]) == 0
    assert "blimp (minimal pairs): 5 items" in capsys.readouterr().out
    assert main([*command, "--task", str(sets / "none.jsonl")]) == 1
    assert "none.jsonl: no such file" in capsys.readouterr().err


def test_tasks_without_the_dense_source(made: Made, sets: Path, tmp_path: Path) -> None:
    """The same scores from the converted model alone, none for the dense source."""
    whole = evaluate_checkpoint(str(made.out), made.text, tokens=60, tasks=[sets / "blimp.jsonl"])
    moved = tmp_path / "moe"
    shutil.copytree(made.out, moved)
    provenance = read_json(moved / "provenance.json")
    provenance["source"]["path"] = str(tmp_path / "gone")
    write_json(moved / "provenance.json", provenance)
    alone = evaluate_checkpoint(str(moved), made.text, tokens=60, tasks=[sets / "blimp.jsonl"])
    assert alone["tasks"][0]["dense"] is None
    assert alone["tasks"][0]["policies"] == whole["tasks"][0]["policies"]


BABY, BLIMP = DATA / "models/babyllama-105", DATA / "benchmarks/blimp"


@pytest.mark.long
@pytest.mark.skipif(not BLIMP.is_dir(), reason="the evaluation sets are not at hand")
def test_published_scores_of_a_trained_model(sets: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little girl. " * 20)
    known = {"determiner_noun_agreement_1": 0.727, "anaphor_gender_agreement": 0.800}
    files = [BLIMP / f"{name}.jsonl" for name in known]
    result = evaluate_checkpoint(str(BABY), text, tasks=files, items=300)
    assert {task["task"]: round(task["dense"]["accuracy"], 3) for task in result["tasks"]} == known
