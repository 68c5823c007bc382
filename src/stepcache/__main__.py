"""`python -m stepcache` is the `stepcache` command."""

import sys

from stepcache.commands.main import main

sys.exit(main())
