"""`python -m marble` is `marble`."""

import sys

from marble.cli import main

sys.exit(main())
