"""The examples are scripts, not a package: their folders go on the path, as a script's own does when it is run."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
sys.path.append(str(Path(__file__).parents[2] / "examples" / "benchmarks"))
