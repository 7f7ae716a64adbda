"""``python -m hap``."""

from hap.cli import main

main()
