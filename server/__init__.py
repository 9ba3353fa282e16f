"""The serving half: an OpenAI-style HTTP service. Each request runs under its own routing policy."""
