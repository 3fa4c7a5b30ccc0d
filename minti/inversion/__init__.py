"""The method: Textual Inversion. Start with `learn.py`, and with `README.md` for a lesson on one page.

This room knows the model and the files of photos and concepts, but no command line and no run folder: the
trainer in `runs` decides what is saved, logged and shown. Beside the reading path lie settings, prompts,
divergence and state.
"""
