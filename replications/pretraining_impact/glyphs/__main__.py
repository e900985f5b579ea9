"""`python -m replications.pretraining_impact.glyphs`: draw the corpus."""

from common import commandline

if __name__ == "__main__":
    commandline.listen()  # before what takes long to load
    from replications.pretraining_impact.glyphs.drawing import main

    commandline.run(main)
