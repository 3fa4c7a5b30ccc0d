"""Tuning the model itself to a thing: pivotal tuning around a learned word, and DreamBooth.

`tuner.py` is the method: which weights change, and a step. `run.py` is what happens around it, and what a run
leaves in its folder; `__main__.py` is the command. This room knows all rooms up to `runs`.
"""
