"""Run a trainer's module as it is, and record its steps: times, memory, gradients, a profile.

    bench_process.py SETTINGS.json MODULE [ARGUMENT ...]

It runs in this project's Python and in musubi-tuner's (3.10 or newer). The trainer is not changed:
hooks around every optimizer's step see when a step ends and which gradients it has. The report is
written after the first steps, and again at the end.
"""

from __future__ import annotations

import json
import re
import runpy
import sys
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import check_common as common
import torch
from safetensors import safe_open
from torch.optim import optimizer as optimizers

# Kernels by what they are for: the first pattern that is found in the name.
GROUPS = {
    "copies from and to main memory": r"Memcpy (HtoD|DtoH)",
    "copies within the GPU, filling": r"Memcpy DtoD|Memset|copy_kernel|FillFunctor",
    "attention, backward": r"bprop|flash_bwd|dot_do_o|convert_dq|cutlassB|fmha.*backward",
    "attention, forward": r"fprop|flash_fwd|cutlassF|fmha",
    "optimizer and clipping": r"multi_tensor|fused_adam|foreach|lpnorm",
    "matrix products": r"nvjet|gemm|xmma|cublas|cutlass|splitK|split_k",
    "compiled element-wise": r"^triton_",
    "other element-wise": r"",
}


@dataclass(frozen=True)
class Settings:
    """What is recorded.

    Attributes:
        report: the JSON file to write.
        lora: the file that the LoRA starts from, whose values name the parameters.
        reference: the float32 gradients of the checked step, if they are to be compared.
        checked: the number of the checked step.
        profile_at: the number of steps after which one step is watched for waits of the host and
            the next one profiled; 0 for never.
    """

    report: str
    lora: str
    reference: str | None
    checked: int
    profile_at: int

    @classmethod
    def read(cls, path: Path) -> Settings:
        """Read the settings that the bench wrote."""
        return cls(**json.loads(path.read_text("utf-8")))


class Watch:
    """The hooks, and what they have seen."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.report: dict[str, Any] = {"ended": []}
        self.waits: dict[str, int] = {}
        self.profiler: Any = None
        self.names: dict[int, str] = {}

    def before(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Find the names of what is trained, and compare the gradients of the checked step."""
        if self.settings.reference is None:
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        now = len(self.report["ended"]) + 1
        if now == 1:
            with safe_open(self.settings.lora, framework="pt") as file:
                known = {key_of(file.get_tensor(n)): n for n in file.keys() if "lora_" in n}  # noqa: SIM118
            keys = ((p, key_of(p.detach())) for p in parameters)
            self.names = {id(p): known[key] for p, key in keys if key in known}
        if now == self.settings.checked:
            self.compare(parameters, Path(self.settings.reference))

    def compare(self, parameters: list[torch.Tensor], reference: Path) -> None:
        """Compare gradients with the reference, tensor by tensor."""
        found: dict[str, float] = {}
        square = 0.0
        with safe_open(reference, framework="pt", device=str(parameters[0].device)) as file:
            known = set(file.keys())
            for parameter in parameters:
                name = self.names.get(id(parameter))
                if name is None:
                    continue
                # The last block's text tokens lead nowhere: their tensors have no gradient.
                right = {name: file.get_tensor(name) if name in known else None}
                found |= common.errors({name: parameter.grad}, right)
                if parameter.grad is not None:
                    square += float(parameter.grad.float().norm()) ** 2
        self.report |= {"errors": found, "norm": square**0.5, "parameters": len(parameters)}

    def after(self, *_: Any) -> None:
        """Note the time; begin and end what watches single steps."""
        ended = self.report["ended"]
        ended.append(time.time())
        at = self.settings.profile_at
        if len(ended) <= self.settings.checked:
            self.write()
        if not at or not torch.cuda.is_available():
            return
        if len(ended) == at:
            self.report["reserved"] = torch.cuda.max_memory_reserved()
            self.watch_waits(on=True)
        elif len(ended) == at + 1:
            self.watch_waits(on=False)
            torch.cuda.synchronize()
            kinds = torch.profiler.ProfilerActivity
            self.profiler = torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA])
            self.profiler.start()
            self.profiled = time.time()
        elif len(ended) == at + 2:
            torch.cuda.synchronize()
            seconds = time.time() - self.profiled
            self.profiler.stop()
            self.report["profile"] = profile(self.profiler.events(), seconds)
            self.profiler = None
            self.write()

    def watch_waits(self, *, on: bool) -> None:
        """Have PyTorch warn whenever the host waits for the GPU, and note where."""
        torch.cuda.set_sync_debug_mode("warn" if on else "default")
        if on:
            self.usual = warnings.showwarning
            warnings.simplefilter("always")
            warnings.showwarning = self.wait
        else:
            warnings.showwarning = self.usual
            self.report["waits"] = self.waits

    def wait(self, message: Any, *_: Any, **__: Any) -> None:
        """Note the lines of ours or musubi-tuner's that made the host wait."""
        if "synchroniz" not in str(message):
            return
        lines = [
            f"{Path(frame.filename).name}:{frame.lineno} {frame.name}"
            for frame in traceback.extract_stack()
            if re.search(r"runner/|musubi_tuner/|accelerate/|torch/(optim|nn/utils)/",
                         frame.filename)
        ]  # fmt: skip
        where = " < ".join(reversed(lines[-3:])) or "elsewhere"
        self.waits[where] = self.waits.get(where, 0) + 1

    def write(self) -> None:
        """Write the report as it is now."""
        if torch.cuda.is_available():
            self.report.setdefault("reserved", 0)
            self.report["reserved"] = max(self.report["reserved"], torch.cuda.max_memory_reserved())
        path = Path(self.settings.report)
        path.with_suffix(".tmp").write_text(json.dumps(self.report), "utf-8")
        path.with_suffix(".tmp").replace(path)


def key_of(tensor: torch.Tensor) -> tuple[float, ...]:
    """Return what tells a LoRA's random matrices from one another: shape and first values."""
    return (*tensor.shape, *tensor.flatten()[:4].float().tolist())


def profile(events: Any, seconds: float) -> dict[str, Any]:
    """Sum up one profiled step.

    Args:
        events: what the profiler saw.
        seconds: how long the step took.

    Returns:
        Milliseconds of each group of kernels and of the costliest kernels, of the time in which
        the GPU computed, only copied or did nothing, and the waits of the host.
    """
    cuda: Any = torch.profiler.DeviceType.CUDA
    kernels = [
        (e.name, e.time_range.start, e.time_range.end)
        for e in events
        if e.device_type == cuda and not getattr(e, "is_user_annotation", False)
    ]
    groups: dict[str, list[float]] = {}
    single: dict[str, list[float]] = {}
    for name, begin, end in kernels:
        group = next(g for g, pattern in GROUPS.items() if re.search(pattern, name))
        for table, key in ((groups, group), (single, name[:120])):
            entry = table.setdefault(key, [0, 0])
            entry[0] += 1
            entry[1] += (end - begin) / 1e3
    copies = "copies from and to main memory"
    computed = [k[1:] for k in kernels if not re.search(GROUPS[copies], k[0])]
    busy = covered([k[1:] for k in kernels])
    computing = covered(computed)
    waits: dict[str, list[float]] = {}
    for event in events:
        if event.device_type != cuda and re.match(
            r"cuda\w*Synchronize|aten::(item|_local_scalar_dense)$|cudaMalloc|cudaHostAlloc",
            event.name,
        ):
            entry = waits.setdefault(event.name, [0, 0])
            entry[0] += 1
            entry[1] += (event.time_range.end - event.time_range.start) / 1e3
    order = sorted(single.items(), key=lambda pair: -pair[1][1])
    return {
        "seconds": seconds,
        "computing": computing,
        "only copying": busy - computing,
        "idle": seconds * 1e3 - busy,
        "groups": groups,
        "kernels": dict(order[:40]),
        "waits": waits,
    }


def covered(spans: list[tuple[float, float]]) -> float:
    """Return the milliseconds that spans of microseconds cover together."""
    total, last = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, last))
        last = max(last, end)
    return total / 1e3


def main() -> None:
    watch = Watch(Settings.read(Path(sys.argv[1])))
    module = sys.argv[2]
    sys.argv = sys.argv[2:]
    optimizers.register_optimizer_step_pre_hook(watch.before)
    optimizers.register_optimizer_step_post_hook(watch.after)
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        watch.write()


if __name__ == "__main__":
    main()
