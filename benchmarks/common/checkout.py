"""Lets a script import what it shares with the tests: importing this puts the checkout's own folder on the path."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
