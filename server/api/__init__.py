"""The HTTP API: routes, request fields, admission and answers."""
