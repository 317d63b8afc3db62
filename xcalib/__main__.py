"""``python -m xcalib`` is ``xcalib``."""

from xcalib.cli import main

main()
