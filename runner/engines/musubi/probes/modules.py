"""Print which modules are missing and why, some versions, and whether torch sees a GPU.

The argument is JSON: ``find`` lists modules that must exist, ``import`` pairs of a module to import
and an attribute it must have, ``versions`` packages.
"""

import importlib
import importlib.metadata
import importlib.util
import json
import sys
from contextlib import suppress
from typing import Any

request = json.loads(sys.argv[1])
answer: dict[str, Any] = {"missing": {}, "versions": {}, "cuda": False}
for name in request["find"]:
    if importlib.util.find_spec(name) is None:
        answer["missing"][name] = "not there"
for name, attribute in request["import"]:
    try:
        module = importlib.import_module(name)
        if attribute and not hasattr(module, attribute):
            answer["missing"][name] = f"it has no {attribute}"
    except BaseException as error:
        answer["missing"][name] = " ".join(f"{type(error).__name__}: {error}".split())
for name in request["versions"]:
    with suppress(importlib.metadata.PackageNotFoundError):
        answer["versions"][name] = importlib.metadata.version(name)
if "torch" not in answer["missing"]:
    import torch

    answer["cuda"] = torch.cuda.is_available()
print("\n" + json.dumps(answer))
