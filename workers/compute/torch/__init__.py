"""Compute on any device that torch has: the plain form, which the dense reference is made of."""
