"""Attention: the layer, its reference in torch, and the paged cache."""
