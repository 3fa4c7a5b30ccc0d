"""The method: Textual Inversion. Start with `learn.py`, and with `README.md` for a lesson on one page.

This room knows the model and the files of photos and concepts, but no command line and no run folder: the
trainer in `runs` decides what is saved, logged and shown. Beside the reading path lie the readers of options
and templates (settings, templates), what is off by default (extensions, optimizers), and what guards a run
(new_words, divergence, state).
"""
