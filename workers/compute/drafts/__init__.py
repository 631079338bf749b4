"""Several tokens a step: drafts of what may follow, verified with the new token in one pass over the weights.

Read `steps.py` first: a run's decode steps, some of which carry drafts. `source.py` says what drafts come
from, `lookup.py` finds them in the text itself, `model.py` has a smaller model write them, `worth.py` decides
by what was measured how many a step verifies.

No draft changes a token. A step's rows are computed as one token would be alone, and every token is chosen
from the model's own logits by the draw of its place; a draft counts where it is the token that was chosen.
"""
