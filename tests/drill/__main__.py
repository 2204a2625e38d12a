"""`python -m tests.drill`: what `make drill` calls."""

import sys

from tests.drill.run import main

main(sys.argv[1:])
