"""The parts of the soak test: mixed traffic, an operator, and the comparison of what clients saw with the server's counters."""
