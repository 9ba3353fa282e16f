"""Benchmarks: commands that print a table and one JSON line. Committed results lie under results/<hardware>/."""
