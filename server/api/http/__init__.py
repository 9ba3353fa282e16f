"""Connections, headers, bodies and errors: what every route shares."""
