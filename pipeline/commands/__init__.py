"""One file per command of the command line. Start with `generate.py`, the main job."""
