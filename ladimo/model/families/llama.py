"""LLaMA 1 to 3, and everything that calls itself `llama`."""

from ladimo.model.families.family import Family

LLAMA = Family("llama")
