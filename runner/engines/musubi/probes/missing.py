"""Print which of the modules named as arguments are missing, without importing any."""

import importlib.util
import json
import sys

print(json.dumps([name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]))
