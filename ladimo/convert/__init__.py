"""Conversion: from a dense LLaMA checkpoint to a measured Mixture-of-Experts checkpoint. The server imports none of it."""
