"""Answers: from the engine's tokens to what a client reads."""
