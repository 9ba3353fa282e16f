"""From the fields of a request to what the engine is asked."""
