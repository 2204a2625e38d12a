"""One class per resource: SQL in the open, rows as wire types, one transaction per decision with its events."""
