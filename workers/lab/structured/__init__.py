"""Answers by JSON schemas: whether each follows its own, and what a mask costs a token.

Read `questions.py` for what is asked, then `measure.py`.
"""
