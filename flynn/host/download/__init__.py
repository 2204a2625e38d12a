"""Getting signed releases onto this host: fetch, trust, pull. Imported when it is needed: it brings the TUF library."""
