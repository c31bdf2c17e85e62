"""A small W&B server on 127.0.0.1 for the real client: runs, files, artifacts, sweeps and agents.

It stores what the client sends and answers from it: resuming a run reads its history back, a sweep hands out trials.
It needs only the standard library and yaml.
"""

import base64
import gzip
import json
import math
import random
import re
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml

ENTITY = "lab"
API_KEY = "a" * 40
ENDED = ("finished", "failed", "crashed", "killed", "preempted")


@dataclass
class ServerRun:
    name: str
    project: str
    sweep: str | None = None
    display_name: str = ""
    config: dict = field(default_factory=dict)
    summary: dict = field(default_factory=dict)
    lines: dict = field(default_factory=lambda: defaultdict(list))  # {file of the stream: its lines}
    files: dict = field(default_factory=dict)  # {name: bytes}
    state: str = "running"
    exit_code: int | None = None
    preempting: bool = False
    starts: int = 0

    @property
    def history(self):
        return [json.loads(line) for line in self.lines["wandb-history.jsonl"]]

    @property
    def epochs(self):
        """The epochs in the history, which also has rows without an epoch."""
        return [row["epoch"] for row in self.history if "val_loss" in row]

    def as_answer(self):
        history, events = self.lines["wandb-history.jsonl"], self.lines["wandb-events.jsonl"]
        return {
            "id": f"id-{self.name}",
            "name": self.name,
            "displayName": self.display_name or self.name,
            "description": None,
            "config": json.dumps(self.config),
            "summaryMetrics": json.dumps(self.summary),
            "sweepName": self.sweep,
            "state": self.state,
            "project": project_answer(self.project),
            "historyLineCount": len(history),
            "eventsLineCount": len(events),
            "logLineCount": len(self.lines["output.log"]),
            "historyTail": json.dumps(history[-1:]),
            "eventsTail": json.dumps(events[-1:]),
            "tags": [],
            "notes": None,
            "wandbConfig": json.dumps({"t": 1}),  # tells the client that the run has started
        }


@dataclass
class ServerSweep:
    name: str
    project: str
    config: str
    trials: int = 2  # to hand out
    requeued: list = field(default_factory=list)  # names of preempted runs
    stop: set = field(default_factory=set)  # names of runs to stop early
    handed_out: list = field(default_factory=list)
    trial_args: dict = field(default_factory=dict)  # {run: its args}
    agents: dict = field(default_factory=dict)  # {agent: its runs}


def project_answer(project):
    return {"id": f"id-{project}", "name": project, "entity": {"id": "id-lab", "name": ENTITY}}


class WandbServer:
    """A context. url: for WANDB_BASE_URL; hanging: accept requests and never answer them."""

    def __init__(self):
        self.runs, self.sweeps, self.artifacts, self.uploads, self.unknown = {}, {}, {}, {}, []
        self.deleted = set()  # names of runs, which are never taken again
        self.hanging, self.lock = False, threading.RLock()
        self._handler = type("Handler", (Handler,), {"server_state": self})
        self._http = None

    def __enter__(self):
        self.start()
        return self

    def start(self, port=0):
        self._http = QuietServer(("127.0.0.1", port), self._handler)
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        self.port = self._http.server_port
        self.url = f"http://127.0.0.1:{self.port}"

    def die(self):
        self._http.shutdown()
        self._http.server_close()
        self._http = None

    def __exit__(self, *_):
        self.hanging = False
        if self._http:
            self.die()

    @property
    def environment(self):
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": API_KEY, "WANDB_MODE": "online", "WANDB_ENTITY": ENTITY}

    # ------------------------------------------------------------------------------------------------- operations

    def answer(self, operation, variables):
        """Answer a GraphQL operation. -> its data. Raises KeyError for an unknown one."""
        with self.lock:
            return getattr(self, f"do_{operation}", self._unknown(operation))(variables)

    def _unknown(self, operation):
        def refuse(variables):
            self.unknown.append(operation)
            raise KeyError(operation)

        return refuse

    def do_Viewer(self, variables):
        return {
            "viewer": {
                "id": "id-lab", "entity": ENTITY, "username": ENTITY, "name": ENTITY, "email": "lab@example.org",
                "flags": "{}", "admin": False, "deletedAt": None, "teams": {"edges": []}, "apiKeys": {"edges": []},
            }
        }  # fmt: skip

    def do_UpsertBucket(self, variables):
        name = variables.get("name") or (variables.get("id") or "").removeprefix("id-")
        if name in self.deleted:
            raise FileExistsError(f"run {ENTITY}/{name} was previously created and deleted; try a new run name")
        inserted = name not in self.runs
        project = variables.get("project") or "uncategorized"
        run = self.runs.setdefault(name, ServerRun(name, project))
        run.sweep = variables.get("sweep") or run.sweep
        run.display_name = variables.get("displayName") or run.display_name
        if variables.get("config"):
            run.config = json.loads(variables["config"])
        if variables.get("summaryMetrics"):
            run.summary = json.loads(variables["summaryMetrics"])
        if inserted or run.state in ENDED:
            run.state, run.starts, run.preempting = "running", run.starts + 1, False
        return {"upsertBucket": {"bucket": run.as_answer(), "inserted": inserted}}

    def delete(self, name):
        """Delete a run, as on the web page."""
        with self.lock:
            del self.runs[name]
            self.deleted.add(name)

    def do_RunResumeStatus(self, variables):
        run = self.runs.get(variables["name"])
        model = project_answer(variables.get("project") or "uncategorized")
        return {"model": {**model, "bucket": run.as_answer() if run else None}}

    def do_RunState(self, variables):
        return {"project": {"run": self.runs[variables["run"]].as_answer()}}

    do_QueryRunInfo = do_RunState

    def do_CreateRunFiles(self, variables):
        files = [{"name": name, "uploadUrl": self._upload(variables["run"], name)} for name in variables["files"]]
        return {"createRunFiles": {"runID": f"id-{variables['run']}", "uploadHeaders": [], "files": files}}

    def do_MarkRunFilesUploaded(self, variables):
        return {"markRunFilesUploaded": {"success": True}}

    def _upload(self, owner, name):
        key = f"{len(self.uploads)}"
        self.uploads[key] = owner, name
        return f"{self.url}/upload/{key}"

    # -------------------------------------------------------------------------------------------------- artifacts

    def do_CreateArtifact(self, variables):
        identity = f"artifact-{len(self.artifacts)}"
        self.artifacts[identity] = {**variables["input"], "state": "PENDING", "files": {}}
        answer = {"id": identity, "state": "PENDING", "artifactSequence": {"id": "sequence", "latestArtifact": None}}
        return {"createArtifact": {"artifact": answer}}

    def do_CreateArtifactFiles(self, variables):
        edges = []
        for file in variables["input"]["artifactFiles"]:
            identity = file["artifactID"]
            url = self._upload(identity, file["name"])
            node = {"storagePath": file["name"], "uploadUrl": url, "uploadHeaders": [], "artifact": {"id": identity}}
            edges.append({"node": {**node, "uploadMultipartUrls": None}})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def do_CreateArtifactManifest(self, variables):
        url = self._upload(variables["artifactID"], variables["name"])
        file = {"id": "manifest-file", "uploadUrl": url, "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": variables["artifactID"], "file": file}}}

    def do_UpdateArtifactManifest(self, variables):
        url = self._upload(variables["artifactManifestID"], "wandb_manifest.json")
        file = {"id": "manifest-file", "uploadUrl": url, "uploadHeaders": []}
        return {"updateArtifactManifest": {"artifactManifest": {"id": variables["artifactManifestID"], "file": file}}}

    def do_CommitArtifact(self, variables):
        artifact = self.artifacts[variables["artifactID"]]
        artifact["state"] = "COMMITTED"
        answer = {"id": variables["artifactID"], "digest": artifact.get("digest", "")}
        return {"commitArtifact": {"artifact": answer}}

    def do_UseArtifact(self, variables):
        return {"useArtifact": {"artifact": {"id": variables["input"].get("artifactID", "")}}}

    def do_ClientIDMapping(self, variables):
        found = [key for key, artifact in self.artifacts.items() if artifact.get("clientID") == variables["clientID"]]
        return {"clientIDMapping": {"serverID": found[0]} if found else None}

    # --------------------------------------------------------------------------------------------- sweeps and agents

    def do_UpsertSweep(self, variables):
        name = f"sweep{len(self.sweeps)}"
        self.sweeps[name] = ServerSweep(name, variables.get("projectName") or "uncategorized", variables["config"])
        answer = {"id": name, "name": name, "project": project_answer(self.sweeps[name].project)}
        return {"upsertSweep": {"sweep": answer, "configValidationWarnings": []}}

    def do_SweepWithRuns(self, variables):
        sweep = self.sweeps[variables["sweep"]]
        runs = [
            {**run.as_answer(), "shouldStop": run.name in sweep.stop, "stopped": False}
            for run in self.runs.values()
            if run.sweep == sweep.name
        ]
        answer = {"id": sweep.name, "name": sweep.name, "state": "RUNNING", "config": sweep.config}
        return {"project": {"sweep": {**answer, "runs": {"edges": [{"node": run} for run in runs]}}}}

    def do_CreateAgent(self, variables):
        sweep = self.sweeps[variables["sweep"]]
        name = f"{sweep.name}-agent{len(sweep.agents)}"
        sweep.agents[name] = []
        return {"createAgent": {"agent": {"id": name}}}

    def do_Heartbeat(self, variables):
        sweep = self.sweeps[variables["id"].partition("-")[0]]
        running = list(json.loads(variables["runState"]))
        commands = [{"type": "stop", "run_id": name} for name in running if name in sweep.stop]
        if not running:
            commands = [self._next_command(sweep)]
        return {"agentHeartbeat": {"agent": {"id": variables["id"]}, "commands": json.dumps(commands)}}

    def _next_command(self, sweep):
        config = yaml.safe_load(sweep.config)
        if sweep.requeued:
            kind, name = "resume", sweep.requeued.pop(0)
        elif len(sweep.handed_out) < sweep.trials:
            kind, name = "run", f"{sweep.name}trial{len(sweep.handed_out)}"
            sweep.handed_out.append(name)
            draw = random.Random(name)
            sweep.trial_args[name] = {
                key: {"value": value_of(spec, draw)} for key, spec in config["parameters"].items()
            }
        else:
            return {"type": "exit"}
        return {"type": kind, "run_id": name, "program": config["program"], "args": sweep.trial_args[name]}

    # ---------------------------------------------------------------------------------------------------- file stream

    def stream(self, run_name, content):
        with self.lock:
            run = self.runs[run_name]
            for name, chunk in (content.get("files") or {}).items():
                lines = run.lines[name]
                del lines[chunk["offset"] :]
                lines += chunk["content"]
            if run.lines["wandb-summary.json"]:
                run.summary = json.loads(run.lines["wandb-summary.json"][-1])
            run.preempting |= bool(content.get("preempting"))
            if content.get("complete"):
                run.exit_code = content.get("exitcode")
                run.state = "finished" if run.exit_code == 0 else "preempted" if run.preempting else "failed"
                if run.state == "preempted" and run.sweep:
                    self.sweeps[run.sweep].requeued.append(run_name)
            stopped = run.sweep is not None and run_name in self.sweeps[run.sweep].stop
            return {"exitcode": None, "limits": {}, "stopped": stopped}

    def receive(self, key, content):
        with self.lock:
            owner, name = self.uploads[key]
            files = self.runs[owner].files if owner in self.runs else self.artifacts[owner]["files"]
            files[name] = content


def value_of(spec, draw):
    """Draw a value of a parameter of a sweep's YAML file."""
    if "value" in spec:
        return spec["value"]
    if "values" in spec:
        return draw.choice(spec["values"])
    if spec.get("distribution") == "log_uniform_values":
        return math.exp(draw.uniform(math.log(spec["min"]), math.log(spec["max"])))
    integers = isinstance(spec["min"], int) and isinstance(spec["max"], int)
    return draw.randint(spec["min"], spec["max"]) if integers else draw.uniform(spec["min"], spec["max"])


class QuietServer(ThreadingHTTPServer):
    daemon_threads = allow_reuse_address = True

    def handle_error(self, *_):  # clients that are killed close their connections
        pass


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state = None

    def log_message(self, *_):
        pass

    def _body(self):
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        while self.server_state.hanging:
            time.sleep(0.1)
        return gzip.decompress(content) if self.headers.get("Content-Encoding") == "gzip" else content

    def _reply(self, content, status=200):
        encoded = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(encoded)))
        self.end_headers()
        self.wfile.write(encoded)

    def do_POST(self):
        content, server = self._body(), self.server_state
        stream = re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path)
        if stream:
            return self._reply(server.stream(stream[1], json.loads(content)))
        if self.path != "/graphql":  # telemetry
            return self._reply({})
        if API_KEY not in self._key():
            return self._reply({"errors": [{"message": "user is not logged in"}]}, 401)
        request = json.loads(content)
        operation = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])[1]
        try:
            self._reply({"data": server.answer(operation, request.get("variables") or {})})
        except KeyError as error:
            self._reply({"errors": [{"message": f"not found: {operation} {error}"}]})
        except FileExistsError as error:
            self._reply({"errors": [{"message": str(error)}]}, 409)

    def _key(self):
        kind, _, encoded = (self.headers.get("Authorization") or "").partition(" ")
        return base64.b64decode(encoded).decode(errors="replace") if kind == "Basic" else encoded

    def do_PUT(self):
        self.server_state.receive(self.path.rpartition("/")[2], self._body())
        self._reply({})

    def do_GET(self):
        self._body()
        self._reply({})
