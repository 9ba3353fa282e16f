"""What one feature of the server costs in time."""
