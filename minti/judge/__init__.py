"""Judging pictures: the CLIP that judges, scores with intervals, prompts, and evaluations made of them.

Read `scores.py` first, then `benchmark.py`. The doors (`minti.evaluate`, `minti.study`, `minti.sample`) parse
options, load the models and print; nothing here does. This room knows `model`, `formats`, `cli` and the
folders of `runs`; it knows nothing of `study`. `README.md` describes scores, protocol and command.
"""
