"""The routes: one file per group of paths."""
