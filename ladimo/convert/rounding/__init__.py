"""Chooses the integers of nested weights (`ladimo.model.nested`)."""
