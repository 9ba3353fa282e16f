"""Which routing policy a request runs under: the named policies, the default, the knob and its automatic control."""
