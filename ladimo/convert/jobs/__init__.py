"""Running one function on many items: here, in processes of this machine, or on a Ray cluster."""
