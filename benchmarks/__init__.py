"""How fast the suite trains, as ratios against plain loops measured in the same minutes; see README.md."""
