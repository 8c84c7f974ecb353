"""Commands that run this package's executables; pure."""

from __future__ import annotations

from runner.core.command import Command

_PACKAGE = "runner.engines.diffusers"


def module_command(python: str, source_path: str | None, name: str, *arguments: str) -> Command:
    """Return the command that runs one of this package's executables.

    Args:
        python: the Python to use.
        source_path: the runner's checkout, if it is not installed.
        name: the executable's module.
        arguments: its arguments.
    """
    # One thread is as fast at this size, much faster on a busy computer, and gives the same sums
    # whatever the number of cores.
    environment = [("OMP_NUM_THREADS", "1")]
    # Number GPUs by PCI bus, as nvidia-smi does, so that CUDA_VISIBLE_DEVICES=1 means the GPU that
    # the plan was made for. CUDA's default is fastest first.
    environment.append(("CUDA_DEVICE_ORDER", "PCI_BUS_ID"))
    # Commands run in the run's folder, where Python would not find a checkout.
    if source_path:
        environment.append(("PYTHONPATH", source_path))
    return Command((python, "-m", f"{_PACKAGE}.{name}", *arguments), set_env=tuple(environment))
