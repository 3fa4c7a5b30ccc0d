"""The study: a recipe says which words to learn and compare; one command learns, scores and reports them.

Read `recipe.py` first. `concepts.py` and `variants.py` spread a recipe out; `learner.py` learns;
`ways.py` and `rivals.py` make pictures without a word, or with more than a word;
`classifier.py` reads what pictures really show; `summary.py` takes means and tests claims; `study_report.py`
writes; `questionnaire.py` asks people, and `answers.py` reads what they say. This room knows all
rooms. Only `__main__.py` parses options and prints. `README.md` describes recipes and results.
"""
