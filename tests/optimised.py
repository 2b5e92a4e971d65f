"""The reader of optimised programs, benchmarks/hlo.py, for tests."""

import importlib.util
import sys
from pathlib import Path

spec = importlib.util.spec_from_file_location("hlo", Path(__file__).parents[1] / "benchmarks/hlo.py")
hlo = importlib.util.module_from_spec(spec)
sys.modules["hlo"] = hlo
spec.loader.exec_module(hlo)
