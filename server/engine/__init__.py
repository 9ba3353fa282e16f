"""The engine: one thread that owns the device. Knows no HTTP; everything else talks to it in messages."""
