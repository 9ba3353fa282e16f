"""Choosing the integers that stand for weights at low precision (`ladimo.model.nested`)."""
