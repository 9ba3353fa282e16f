"""Models that were trained as Mixture-of-Experts: they are profiled and pruned, not converted."""
