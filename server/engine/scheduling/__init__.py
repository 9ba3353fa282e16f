"""Which sequences the next step works on, and which blocks and rows they hold."""
