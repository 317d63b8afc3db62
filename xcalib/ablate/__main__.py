"""``python -m xcalib.ablate DIR``: see :mod:`xcalib.ablate.page`."""

from xcalib.ablate.page import main

if __name__ == "__main__":
    main()
