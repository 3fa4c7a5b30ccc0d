"""The study of the paper in one command: many words learned at once, all of them scored, one report."""
