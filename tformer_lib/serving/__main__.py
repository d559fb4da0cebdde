"""``python -m tformer_lib.serving``."""

import sys

from tformer_lib.serving.command import main

sys.exit(main())
