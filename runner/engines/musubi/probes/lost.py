"""Print which of the modules in the arguments are not there; none is imported."""

import importlib.util
import json
import sys

print(json.dumps([name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]))
