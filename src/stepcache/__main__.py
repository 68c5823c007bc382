"""`python -m stepcache` is the `stepcache` command."""

import sys

from stepcache.cli import main

sys.exit(main())
