"""`python -m mmsid.cli`."""

from mmsid.cli import main

main()
