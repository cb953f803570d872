"""``python -m medclr`` is ``medclr``; torchrun starts it this way."""

import sys

from medclr.cli import main

sys.exit(main())
