"""The command line's entry: `python run.py --prompt "Once upon a time"`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Ours come first, whatever PYTHONPATH or PYTHONSAFEPATH say.
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    try:
        from pipeline.cli import main
    except KeyboardInterrupt:  # within the first second, before anything was begun
        sys.exit(130)
    sys.exit(main())
