"""How a deployment moves from an old release to a new one; the rules only."""
