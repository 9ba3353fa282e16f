"""The serving half: an OpenAI-style HTTP service whose requests each run under their own routing policy."""
