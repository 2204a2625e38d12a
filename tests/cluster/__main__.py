"""`python -m tests.cluster`: what the Makefile's cluster targets call."""

import sys

from tests.cluster.lab.cluster import main

main(sys.argv[1:])
