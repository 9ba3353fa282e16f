"""Benchmarks: commands that print a table and one JSON line. Committed results are in results/<hardware>/."""
