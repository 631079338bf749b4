"""What a person sees of a ring while it works.

`waits.py` ends silences; `figures.py` is what --watch shows, `display.py` how, and `watch.py` when.
"""
