"""lm-evaluation-harness against the running server gives the scores of its own `hf` backend on the same checkpoint."""

import asyncio
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from tests.factories import make_dense
from tests.server.real import serving_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed"),
    pytest.mark.filterwarnings("ignore"),
]

CHOICE_TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
GENERATION_TASK = """
task: tiny_generation
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "x"
generation_kwargs: {{until: ["\\n\\n", "q", "z", "J", "!!"], max_gen_toks: 12, do_sample: false, temperature: 0.0, top_p: 1.0}}
metric_list: [{{metric: exact_match}}]
"""
DOCUMENTS = [
    {"question": f"Item {number}: naïve café?", "choices": [" yes", " no, never", f" {number} €"], "answer": number % 3}
    for number in range(12)
]


def write_tasks(directory: Path) -> Path:
    directory.mkdir()
    data = directory / "documents.jsonl"
    data.write_text("\n".join(map(json.dumps, DOCUMENTS)))
    (directory / "choice.yaml").write_text(CHOICE_TASK.format(data=data))
    (directory / "generation.yaml").write_text(GENERATION_TASK.format(data=data))
    return directory


def evaluate(backend: str, arguments: str, tasks: Path, **options: Any) -> dict[str, Any]:
    """Each document's responses by task: (log-likelihood, is greedy) per choice, or the generated text."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    results = simple_evaluate(
        model=backend,
        model_args=arguments,
        tasks=["tiny_choice", "tiny_generation"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
        **options,
    )
    assert results is not None
    return {
        task: {sample["doc_id"]: sample["filtered_resps"] for sample in samples} for task, samples in results["samples"].items()
    }


@pytest.mark.parametrize(
    ("tokenizer", "batch_size"),
    [("tokenizer_backend=huggingface", 3), pytest.param("tokenizer_backend=remote", 1, marks=pytest.mark.long)],
)
async def test_scores_equal_the_hf_backend_s(tmp_path: Path, tokenizer: str, batch_size: int) -> None:
    model, tasks = make_dense(tmp_path / "model"), write_tasks(tmp_path / "tasks")
    expected = await asyncio.to_thread(
        evaluate, "hf", f"pretrained={model},dtype=float32,max_length=256,add_bos_token=True", tasks, device="cpu", batch_size=1
    )
    async with serving_model(model) as url:
        arguments = (
            f"model=model,base_url={url}/v1/completions,tokenizer={model},{tokenizer},max_length=256,num_concurrent=4,"
            "max_retries=1,add_bos_token=True"
        )
        measured = await asyncio.to_thread(evaluate, "local-completions", arguments, tasks, batch_size=batch_size)
    assert set(expected["tiny_choice"]) == set(measured["tiny_choice"]) == set(range(len(DOCUMENTS)))
    for document, responses in expected["tiny_choice"].items():
        for (value, greedy), (other, other_greedy) in zip(responses, measured["tiny_choice"][document], strict=True):
            assert float(other) == pytest.approx(float(value), abs=1e-3)
            assert str(other_greedy) == str(greedy)
    assert set(measured["tiny_generation"]) == set(expected["tiny_generation"])
    for document, texts in expected["tiny_generation"].items():
        for theirs, ours in zip(texts, measured["tiny_generation"][document], strict=True):
            # An answer that is cut within a character leaves its bytes out, where transformers writes a replacement character.
            assert theirs.startswith(ours)
            assert set(theirs[len(ours) :]) <= {"\ufffd"}
            assert len(ours) >= len(theirs) - 3
