"""The pipeline's code. Imported first by `python -m stages.X` and by `mer`, whose imports take seconds."""

import os
import sys

if os.path.basename(sys.argv[0]) in ("-m", "mer"):  # Python's name for a module that it is still looking for
    from stages.engine.interrupts import end_at_once

    end_at_once()
