"""`python -m sequencerd`."""

from sequencerd.cli import main

main()
