"""A run of MLflow for each run here, in the experiment of its pair. Where it goes is MLFLOW_TRACKING_URI's word; without it, a
folder `mlruns` beside `runs`: `mlflow ui --backend-store-uri outputs/mlruns` shows it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

from transfer_cli.sinks import SinkRun

STATES = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
AT_ONCE = 100  # parameters that a request may hold
LONGEST = 500  # characters of a parameter


class Mlflow:
    def __init__(self, run: SinkRun) -> None:
        if "MLFLOW_TRACKING_URI" not in os.environ:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # version 3.7 on warns of, or refuses, folders
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self.client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or f"file:{run.folder.parents[2] / 'mlruns'}")
        experiment = self.client.get_experiment_by_name(run.pair)
        number = experiment.experiment_id if experiment else self.client.create_experiment(run.pair)
        for former in self.client.search_runs([number], f"tags.identity = '{run.identity}'"):
            self.client.delete_run(former.info.run_id)
        self.id = self.client.create_run(number, run_name=run.name, tags={"identity": run.identity}).info.run_id
        parameters = [Param(key, str(value)[:LONGEST]) for key, value in run.settings.items()]
        for start in range(0, len(parameters), AT_ONCE):
            self.client.log_batch(self.id, params=parameters[start : start + AT_ONCE])

    def write(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self.client.log_batch(self.id, metrics=[Metric(name, value, now, step) for name, value in values.items()])

    def close(self, state: str) -> None:
        self.client.set_terminated(self.id, STATES[state])
