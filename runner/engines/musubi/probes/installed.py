"""Import the modules named as arguments; print their versions, and the error of each that fails.

It also prints torch's CUDA version, if usable, and the commit that musubi-tuner was installed from.
"""

import importlib
import importlib.metadata
import json
import sys
from typing import Any

answer: dict[str, Any] = {"versions": {}, "missing": {}, "cuda": None, "commit": None}
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
        package = {"cv2": "opencv-python", "PIL": "pillow"}.get(name, name)
        answer["versions"][name] = importlib.metadata.version(package)
    except BaseException as error:
        answer["missing"][name] = " ".join(f"{type(error).__name__}: {error}".split())
try:
    import torch

    answer["cuda"] = torch.version.cuda if torch.cuda.is_available() else None
    direct = importlib.metadata.distribution("musubi-tuner").read_text("direct_url.json")
    answer["commit"] = json.loads(direct or "{}").get("vcs_info", {}).get("commit_id")
except BaseException:
    pass
print("\n" + json.dumps(answer))
