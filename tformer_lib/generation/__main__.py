"""``python -m tformer_lib.generation``."""

import sys

from tformer_lib.generation.command import main

sys.exit(main())
