"""`run.py relufy`: gives a model of smooth activations ReLU, and trains it until it is itself again.

Read `network.py` first (the swap), then `lora.py` (few parameters in the place of all), `distil.py` (what a
token's loss is), `train.py` (the run, which goes on where it was stopped) and `measure.py` (zeros and
perplexity, beside the original and a control). docs/relufy.md.
"""
