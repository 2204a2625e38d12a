"""Benchmarks, always beside the peer in the same run and reported as ratios."""
