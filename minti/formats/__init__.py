"""Other people's files: checkpoints, configs, tokenizers, learned words and photos.

A checkpoint is opened in three hops: `checkpoint.load` -> a plan, which says where each weight is (by
`folder.py` or `single_file.py`) -> `PartPlan.load`. Bytes are read by `weightfile.py` and `pickles.py`, JSON
by `json_checks.py`; `reading.py` turns whatever goes wrong with a file into one line, and `kinds.py` names
files of other kinds. The room may import from `model` and `errors` only; it does not train or print.
"""
