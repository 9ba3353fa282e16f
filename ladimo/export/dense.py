"""Export to a plain LLaMA directory, which transformers, vLLM, SGLang and llama.cpp's converter can read without our code."""

from pathlib import Path

from ladimo.checkpoint import write_json, write_tensors
from ladimo.export.dense_view import DenseView


class DenseTarget:
    """The target `dense`."""

    name = "dense"
    help = "a plain LLaMA in Hugging Face layout, for policies that run the same experts for every token"

    def write(self, view: DenseView, out: Path) -> None:
        """Write config.json, the weights and the tokenizer. Raises ValueError for a model that is no LLaMA."""
        write_json(out / "config.json", view.config)
        write_tensors(out, view.tensors())
        view.copy_tokenizer(out)
