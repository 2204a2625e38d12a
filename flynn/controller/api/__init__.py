"""The HTTP API: one module per resource, each turning requests into calls of the stores and nothing more."""
