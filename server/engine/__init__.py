"""The engine: one thread that owns the device. It knows no HTTP. All other code talks to it in messages."""
