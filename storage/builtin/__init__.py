"""The model that ships with flashring: its files, and the program that trained it (`train.py`)."""
