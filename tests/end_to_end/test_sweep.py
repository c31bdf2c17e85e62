"""sweep.yaml with the real `wandb sweep` and `wandb agent`, against the server of tests/tools/wandb_server.py."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml
from helpers import PATIENCE, ROOT, THIN_MAIN, TINY_FLAGS, wait_for

from model import load_checkpoint

WANDB = str(Path(sys.executable).with_name("wandb"))


class Sweeping:
    """A sweep with sweep.yaml on tiny images and the thin network, and its agents."""

    def __init__(self, folder, data_dir, server, epochs, **parameters):
        self.folder, self.server = folder, server
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.environment = {**os.environ, **server.environment, "PATH": path, "OMP_NUM_THREADS": "1"}
        self.environment["WANDB_CONFIG_DIR"] = str(folder / "wandb_config")
        content = yaml.safe_load((ROOT / "sweep.yaml").read_text())
        content["program"] = str(THIN_MAIN)
        content["parameters"] |= {"epochs": {"value": epochs}, **parameters}
        position = content["command"].index("data")
        content["command"][position : position + 1] = [str(data_dir), *TINY_FLAGS[:5]]
        (folder / "sweep.yaml").write_text(yaml.safe_dump(content))
        self._run("sweep", "sweep.yaml")
        (self.sweep,) = server.sweeps.values()

    def _run(self, *words):
        command = [WANDB, *words]
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=PATIENCE
        )
        assert done.returncode == 0, done.stderr

    def agent(self):
        command = [WANDB, "agent", f"lab/{self.sweep.project}/{self.sweep.name}"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, cwd=self.folder, env=self.environment, **pipes)

    def run_dir(self, run):
        return self.folder / f"checkpoints_{run.name}"


def test_two_agents_share_the_trials_of_a_sweep(tmp_path, data_dir, server):
    values = {
        "augmentation_methods": {"value": ["rotation", "shift"]},
        "target_samples_per_class": {"value": None},
        "grad_accum": {"value": 2.0},
    }
    sweeping = Sweeping(tmp_path, data_dir, server, epochs=2, **values)
    agents = [sweeping.agent() for _ in range(2)]
    for agent in agents:
        agent.communicate(timeout=PATIENCE)
    runs = list(server.runs.values())
    assert len(runs) == 2 and all(run.state == "finished" and run.epochs == [0, 1] for run in runs)
    for run in runs:
        args = json.loads((sweeping.run_dir(run) / "args.json").read_text())
        drawn = {name: value["value"] for name, value in sweeping.sweep.trial_args[run.name].items()}
        assert {name: args[name] for name in drawn} == drawn and args["use_augmentation"] is True
        assert (
            run.summary["val_balanced_acc"] == load_checkpoint(sweeping.run_dir(run) / "best_model.pth")["best_metric"]
        )


def test_a_trial_stopped_early_keeps_its_best_and_a_preempted_one_resumes(tmp_path, data_dir, server):
    sweeping = Sweeping(tmp_path, data_dir, server, epochs=400)
    agent = sweeping.agent()
    try:
        first = wait_for(lambda: next((run for run in server.runs.values() if run.epochs), None))
        sweeping.sweep.stop.add(first.name)
        second = wait_for(lambda: next((run for run in server.runs.values() if run != first and run.epochs), None))
        assert first.state == "failed" and 0 < len(first.epochs) < 400  # so W&B does not hand it out again
        assert load_checkpoint(sweeping.run_dir(first) / "best_model.pth")["best_epoch"] >= 0
        lock = (sweeping.run_dir(second) / ".lock").read_text()
        os.kill(int(re.match(r"process (\d+) on", lock)[1]), signal.SIGTERM)  # as a batch system does
        wait_for(lambda: second.starts == 2)
        seen = len(second.epochs)
        wait_for(lambda: len(second.epochs) > seen)
        assert second.epochs == list(range(len(second.epochs)))  # each once
    finally:
        agent.send_signal(signal.SIGINT)
        time.sleep(1)
        agent.kill()
        for run in server.runs.values():
            lock = (sweeping.run_dir(run) / ".lock").read_text()
            subprocess.run(["kill", "-KILL", re.match(r"process (\d+) on", lock)[1]], capture_output=True)
    out = agent.communicate()[0]
    assert "resuming with epoch" in out


def test_a_misspelled_parameter_fails_fast_and_the_agent_shows_why(tmp_path, data_dir, server):
    sweeping = Sweeping(tmp_path, data_dir, server, epochs=1, learnign_rate={"value": 0.1})
    out, _ = sweeping.agent().communicate(timeout=PATIENCE)
    assert "error: unrecognized arguments: --learnign_rate=0.1" in out
    assert not server.runs
