"""Editing photos: the paper's applications of a learned word to a picture that is already there.

Read `blending.py` first (a mask says where to edit: Blended Latent Diffusion), then `inverting.py` (no
mask: DDIM inversion). `region.py` is about pixels: what part of a large photo the model works on, and how the
result is put back. `__main__.py` is the command. This room knows `model`, `formats`, `cli` and `judge`.
"""
