"""Turns source code into a slug (builder) and runs what is in one (runner).

Both programs run in containers next to code that nobody has looked at, and start for every build and every job: they
use the standard library and nothing else of Flynn.
"""
