"""One set of weights at several precisions: how they are made, stored, read and refined."""
