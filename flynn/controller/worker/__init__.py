"""The background work: what takes longer than a request and must survive the process that does it."""
