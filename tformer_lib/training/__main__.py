"""``python -m tformer_lib.training``."""

import sys

from tformer_lib.training.command import main

sys.exit(main())
