"""`python -m pdae_nb …` is the command `pdae …`."""

import sys

from .cli import main

if __name__ == '__main__':
    sys.exit(main())
