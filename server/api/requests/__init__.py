"""Translates the fields of a request for the engine."""
