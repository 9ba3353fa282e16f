"""From the tokens of the engine to what a client reads."""
