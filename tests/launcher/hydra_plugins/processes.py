"""A Hydra launcher whose jobs are processes of their own, as those of joblib and submitit are.

Each job's function, config and Hydra's state travel as a pickle below the sweep's folder, and what
comes of it as another. All jobs run at once. Use it with this folder's parent on PYTHONPATH and
``hydra/launcher=processes``.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

_CHILD = """
import cloudpickle, sys
from pathlib import Path
place = Path(sys.argv[1])
call, arguments = cloudpickle.loads(place.read_bytes())
place.with_suffix(".out").write_bytes(cloudpickle.dumps(call(*arguments)))
"""


ConfigStore.instance().store(
    group="hydra/launcher",
    name="processes",
    node={"_target_": "hydra_plugins.processes.ProcessesLauncher"},
)


class ProcessesLauncher(Launcher):
    """Starts every job, waits for all, and raises when one died, as launchers do."""

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        import cloudpickle

        setup_globals()
        folder = Path(self.config.hydra.sweep.dir) / ".processes"
        folder.mkdir(parents=True, exist_ok=True)
        started = []
        for number, overrides in enumerate(job_overrides, initial_job_idx):
            place = folder / f"{number}.in"
            state = Singleton.get_state()
            arguments = (number, list(overrides), self.hydra_context, self.config)
            call = (_execute, (*arguments, self.task_function, state))
            place.write_bytes(cloudpickle.dumps(call))
            command = [sys.executable, "-c", _CHILD, str(place)]
            started.append((place, subprocess.Popen(command)))
        codes = [process.wait() for _, process in started]
        if any(codes):
            raise RuntimeError(f"a worker died unexpectedly, exit codes {codes}")
        return [cloudpickle.loads(place.with_suffix(".out").read_bytes()) for place, _ in started]


def _execute(
    number: int,
    overrides: list[str],
    hydra_context: HydraContext,
    config: DictConfig,
    task_function: TaskFunction,
    state: dict[Any, Any],
) -> JobReturn:
    setup_globals()
    Singleton.set_state(state)
    sweep_config = hydra_context.config_loader.load_sweep_config(config, overrides)
    with open_dict(sweep_config):
        sweep_config.hydra.job.id = f"{sweep_config.hydra.job.name}_{number}"
        sweep_config.hydra.job.num = number
    HydraConfig.instance().set_config(sweep_config)
    return run_job(
        hydra_context=hydra_context,
        config=sweep_config,
        task_function=task_function,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    )
