"""Pages of docs/ that are made from code and data: the configuration's reference, and the index of results.

`python -m workers.lab.documents` writes both; a test compares them with what is committed.
"""
