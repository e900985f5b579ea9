"""`python -m replications.pretraining_impact.glyphs`: draw the corpus."""

from common import commandline
from replications.pretraining_impact.glyphs import main

commandline.run(main)
