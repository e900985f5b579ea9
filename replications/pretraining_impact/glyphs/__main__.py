"""`python -m replications.pretraining_impact.glyphs`: draw the corpus."""

import sys

from replications.pretraining_impact.glyphs import main

sys.exit(main())
