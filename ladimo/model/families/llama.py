"""LLaMA 1 to 3, and all other models of type `llama`."""

from ladimo.model.families.family import Family

LLAMA = Family("llama", use_sliding_window=False)
