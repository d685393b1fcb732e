"""Proof by force: a stack of its own, verified streams, one fault after another, and a record of every one."""
