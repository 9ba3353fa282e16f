"""The model: dense LLaMA layers, expert layers and the routing rule. It knows no file format, recipe or server."""
