"""``python -m tformer_lib.tokens``."""

import sys

from tformer_lib.tokens.command import main

sys.exit(main())
