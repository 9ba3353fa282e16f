"""The model: dense LLaMA layers, expert layers and the one routing rule. Knows no file format, recipe or server."""
