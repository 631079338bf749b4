"""The command line's entry: `python run.py --prompt "Once upon a time"`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Ours come first, whatever PYTHONPATH or PYTHONSAFEPATH say.
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from pipeline.cli import main

    sys.exit(main())
