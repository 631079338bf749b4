"""What this machine offers and lacks, each with its consequence and its remedy: `run.py doctor`.

Read `finding.py` first, then `system.py` (what the operating system gives) and `abilities.py` (what the
workers find, in a process of their own).
"""
