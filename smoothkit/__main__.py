"""`python -m smoothkit`: the command `smoothkit`, which the workbook beside this package provides."""

import sys
from importlib.metadata import entry_points

(command,) = entry_points(group="console_scripts", name="smoothkit")
sys.exit(command.load()())
