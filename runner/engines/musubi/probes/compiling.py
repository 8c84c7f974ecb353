"""Print what torch.compile is missing: a list of packages, a problem in words, or null.

Triton builds a small module for each kernel. This does the same with the compiler that Triton would
choose (triton/runtime/build.py, the same in 3.3, 3.5 and 3.7). On Windows it has its own compiler.
"""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path


def triton_wanted() -> list[str]:
    """Return the requirement for pip: each torch was built for one version of Triton."""
    try:
        wanted = importlib.metadata.requires("torch") or []
    except importlib.metadata.PackageNotFoundError:
        wanted = []
    pins = [re.fullmatch(r"(triton)[ (]*([<>=!~][^;()]*)?[)]? *(;.*)?", line) for line in wanted]
    return ["triton" + (pin[2] or "").strip() for pin in pins if pin][:1] or ["triton"]


def compiler_problem() -> str | None:
    """Return ``compiler`` or ``headers`` if missing, the compiler's error, or None."""
    compiler = os.environ.get("CC")
    if compiler is None:
        compiler = shutil.which("gcc") or shutil.which("clang")
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    headers = sysconfig.get_paths(scheme=scheme)["include"]
    if compiler is None:
        return "compiler"
    if not Path(headers, "Python.h").is_file():
        return "headers"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.c")
        source.write_text("#include <Python.h>\n")
        command = [compiler, str(source), "-shared", "-fPIC", "-o", f"{source}.so", f"-I{headers}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace")
            message, failed = done.stderr, done.returncode != 0
        except OSError as error:
            message, failed = error.strerror or str(error), True
    if not failed:
        return None
    return (compiler or "CC is empty") + ": " + (message.strip().splitlines() or ["it failed"])[0]


problem: str | list[str] | None = None
if importlib.util.find_spec("triton") is None:
    problem = triton_wanted()
elif sys.platform != "win32":
    problem = compiler_problem()
print("\n" + json.dumps(problem))
