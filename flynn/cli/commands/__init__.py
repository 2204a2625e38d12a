"""One module for each group of commands; each has a `NODES` table of its words."""
