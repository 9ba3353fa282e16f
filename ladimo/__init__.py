"""LaDiMo: turn a dense LLaMA into a Mixture-of-Experts checkpoint that runs at several costs.

Importing the package registers the checkpoint type "ladimo_llama" with transformers.
"""

from ladimo.auto import register_type

__version__ = "0.1.0"

register_type()
