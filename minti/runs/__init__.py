"""A training run: what happens around `Inversion.step`, and what it leaves in its folder.

`trainer` is the loop with its logs, previews and savings; `words` goes from photos to what is learned;
`run_word` holds the progress of one word; `folder` names and reads the files; `options` has the command
line; `verdict` and `report` say what came out. May import `cli` and all below; knows nothing of CLIP scores.
"""
