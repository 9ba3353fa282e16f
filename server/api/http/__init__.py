"""HTTP: connections, headers, bodies, streams and errors."""
