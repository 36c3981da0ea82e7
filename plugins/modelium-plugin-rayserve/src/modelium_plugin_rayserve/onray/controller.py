"""The process between Modelium and a Ray cluster, run by Ray's own interpreter; it outlives Modelium.

It starts the cluster (which then lives and dies with it) or connects to one, and answers JSON over HTTP on a Unix
socket that only this user can open:

    GET    /status                         the cluster, its nodes, Serve's applications and their replicas
    POST   /applications                   deploy, or replace, the application that the body describes
    DELETE /applications/NAME              begin to delete it
    GET    /applications/NAME/log/NODE/N    the last N bytes of its log on another node

Ray's dashboard has routes for some of this. They need the dashboard, which is one more server to guard; its way of
deploying takes the list of all applications each time, and code that is installed on every node. A driver of Ray's own
deploys one application at a time, and sends the code along.

An order to deploy holds `name`, `folder`, `version` and `config` (of the model, as Triton's Python backend gives it),
`gpu` (whether it runs on one), `sees_gpus` (CUDA_VISIBLE_DEVICES, null to leave it to Ray), `threads` (0: as many as
the libraries take), `log` (its file on the controller's node), `nodes` (where replicas may be) and `options` (of
`serve.deployment`).
"""

from __future__ import annotations

import http.server
import json
import logging
import os
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve import RunTarget

from . import pb_utils
from .probe import Probe
from .replica import ModeliumModel

DEPLOYMENT = "ModeliumModel"
"""The one deployment of each of our applications; others are somebody else's."""
NODE_ID = "ray.io/node-id"
"""The label by which a node is chosen: Ray gives it to each."""
OLDEST = (2, 60)
"""Replacing without a gap takes `max_surge_percent`, which is new in it."""

ASK_WITHIN_S = 5.0
LOOK_WITHIN_S = 1.0
"""How long a probe on another node may take; else what it told last counts."""


class Cluster:
    """A connection to the cluster. Safe to use from several threads."""

    def __init__(self, settings: Mapping[str, Any]):
        """Raises what keeps it from coming up."""
        if tuple(map(int, ray.__version__.split(".")[:2])) < OLDEST:
            raise RuntimeError(f"expected Ray {OLDEST[0]}.{OLDEST[1]} or newer, found {ray.__version__}")
        self._probes: dict[str, Any] = {}
        self._looks: dict[str, dict[str, Any]] = {}
        self._probing = threading.Lock()
        self.own = settings["address"] is None
        common = {"log_to_driver": False, "logging_level": "warning", "namespace": "modelium"}
        if self.own:
            ray.init(
                "local",
                num_cpus=settings["num_cpus"],
                object_store_memory=settings["object_store_bytes"],
                include_dashboard=False,
                _temp_dir=settings["temp_dir"],
                _node_ip_address="127.0.0.1",
                **common,
            )
        else:
            _reach(settings["address"])
            ray.init(settings["address"], **common)
        self.me = ray.get_runtime_context().get_node_id()
        self.session = ray._private.worker.global_worker.node.session_name
        self._begin_serve(settings)
        # Everything of this package goes along by value.
        ray.cloudpickle.register_pickle_by_value(sys.modules[pb_utils.__package__])

    def _begin_serve(self, settings: Mapping[str, Any]) -> None:
        """On this node's loopback, unless Serve runs already: then as it is."""
        if serve.status().proxies:
            return
        if not self.own and not any(n["NodeID"] == self.me and _is_head(n) for n in ray.nodes() if n["Alive"]):
            raise RuntimeError(
                "Ray Serve does not run on the cluster, and would be started on its head node, which this machine is "
                "not: run Modelium there, or run `serve start --http-host ADDRESS` with an address that this machine "
                "reaches"
            )
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": settings["http_port"]})

    def status(self) -> dict[str, Any]:
        details = ray.get(self._controller().get_serve_instance_details.remote(), timeout=ASK_WITHIN_S)
        nodes = ray.nodes()
        applications = {name: _application(shown) for name, shown in details["applications"].items()}
        pids: dict[str, list[int]] = {n["NodeID"]: [] for n in nodes if n["Alive"] and n["NodeID"] != self.me}
        for shown in applications.values():
            for replica in shown["replicas"]:
                if replica["node"] in pids and replica["pid"]:
                    pids[replica["node"]].append(replica["pid"])
        looks = self._look(pids)
        return {
            "ray": ray.__version__,
            "address": ray.get_runtime_context().gcs_address,
            "session": self.session,
            "node": self.me,
            "url": self._url(details),
            "nodes": [
                {
                    "id": n["NodeID"],
                    "name": n["NodeName"] or n["NodeManagerAddress"],
                    "alive": n["Alive"],
                    "resources": n["Resources"],
                    "look": looks.get(n["NodeID"]),
                }
                for n in nodes
            ],
            "applications": applications,
        }

    def deploy(self, order: Mapping[str, Any]) -> None:
        """Begin to deploy. Raises `ValueError` for options that Serve refuses."""
        name, options = order["name"], dict(order["options"])
        selector = {NODE_ID: f"in({','.join(order['nodes'])})"} if order["nodes"] else {}
        options["ray_actor_options"] = {**options.get("ray_actor_options", {}), "label_selector": selector}
        deployment = serve.deployment(ModeliumModel, name=DEPLOYMENT, **options)
        target = RunTarget(
            deployment.bind({**order, "log_node": self.me}),
            name=name,
            route_prefix=f"/v2/models/{name}",
            logging_config={"enable_access_log": False},
        )
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)

    def delete(self, name: str) -> None:
        serve.delete(name, _blocking=False)

    def log(self, name: str, node: str, size: int) -> str:
        probe = self._probe(node)
        return str(ray.get(probe.tail.remote(name, size), timeout=ASK_WITHIN_S))

    # ------------------------------------------------------------------ inside

    def _controller(self) -> Any:
        return serve.context._get_global_client()._controller

    def _url(self, details: Mapping[str, Any]) -> str:
        """Where the proxy answers: the one on this node, else any that is there."""
        options, proxies = details["http_options"], details["proxies"]
        proxy = proxies.get(self.me) or next(iter(proxies.values()), None)
        host = options["host"]
        if proxy is not None and host in ("0.0.0.0", "::"):
            host = proxy["node_ip"]
        return f"http://{host}:{options['port']}{(options.get('root_path') or '').rstrip('/')}"

    def _look(self, pids: Mapping[str, list[int]]) -> dict[str, dict[str, Any]]:
        """What the other nodes look like, by id; as they did last where one does not answer at once."""
        with self._probing:
            for gone in self._probes.keys() - pids.keys():
                self._probes.pop(gone)
                self._looks.pop(gone, None)
            asked = {self._probe(node).look.remote(which): node for node, which in pids.items()}
            if asked:
                done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=LOOK_WITHIN_S)
                for answer in done:
                    try:
                        self._looks[asked[answer]] = ray.get(answer)
                    except ray.exceptions.RayError:
                        self._probes.pop(asked[answer], None)  # it or its node has died
            return dict(self._looks)

    def _probe(self, node: str) -> Any:
        if node not in self._probes:
            options: dict[str, Any] = {"num_cpus": 0, "label_selector": {NODE_ID: node}, "max_restarts": -1}
            self._probes[node] = ray.remote(**options)(Probe).remote()
        return self._probes[node]


def _reach(address: str) -> None:
    """Ray itself would try for minutes. Raises `RuntimeError`."""
    host, _, port = address.rpartition(":")
    try:
        if host:
            socket.create_connection((host, int(port)), timeout=ASK_WITHIN_S).close()
    except OSError as error:
        raise RuntimeError(f"nothing answers at {address} (ray_serve.address): {error}") from error


def _is_head(node: Mapping[str, Any]) -> bool:
    return "node:__internal_head__" in node["Resources"]


def _application(shown: Mapping[str, Any]) -> dict[str, Any]:
    """What the driver wants to know of an application."""
    deployment = shown["deployments"].get(DEPLOYMENT) or {}
    actor = (deployment.get("deployment_config") or {}).get("ray_actor_options") or {}
    chosen = (actor.get("label_selector") or {}).get(NODE_ID, "")
    return {
        "ours": not shown["deployments"] or set(shown["deployments"]) == {DEPLOYMENT},
        "route": shown["route_prefix"],
        "status": shown["status"],
        "message": deployment.get("message") or shown["message"],
        "nodes": chosen.removeprefix("in(").removesuffix(")").split(",") if chosen else [],
        "target": deployment.get("target_num_replicas"),
        "replicas": [
            {
                "id": replica["replica_id"],
                "state": replica["state"],
                "node": replica.get("node_id"),
                "pid": replica.get("pid"),
            }
            for replica in deployment.get("replicas", ())
        ],
    }


# --------------------------------------------------------------------------- the JSON interface


class Handler(http.server.BaseHTTPRequestHandler):
    cluster: Cluster

    def do_GET(self) -> None:
        match self.path.strip("/").split("/"):
            case ["status"]:
                self._answer(self.cluster.status)
            case ["applications", name, "log", node, size]:
                self._answer(lambda: {"text": self.cluster.log(name, node, int(size))})
            case _:
                self._send(404, {"error": f"there is no {self.path}"})

    def do_POST(self) -> None:
        order = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._answer(lambda: self.cluster.deploy(order))

    def do_DELETE(self) -> None:
        self._answer(lambda: self.cluster.delete(self.path.strip("/").split("/")[1]))

    def _answer(self, work: Any) -> None:
        try:
            found = work()
        except Exception as error:
            print(f"{self.command} {self.path}: {type(error).__name__}: {error}", flush=True)
            status = 400 if isinstance(error, ValueError | TypeError) else 500
            self._send(status, {"error": f"{type(error).__name__}: {error}"})
        else:
            self._send(200, found or {})

    def _send(self, status: int, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def address_string(self) -> str:
        return "driver"

    def log_message(self, *_: Any) -> None:
        """Nothing: it is asked every few seconds."""


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    request_queue_size = 64


def main() -> None:
    """Its one argument is JSON: `socket`, `address`, `http_port`, `num_cpus`, `object_store_bytes`, `temp_dir`."""
    settings = json.loads(sys.argv[1])
    began = time.monotonic()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # it tells of each order
    try:
        Handler.cluster = Cluster(settings)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(1)  # Ray's threads may hang
    path = Path(settings["socket"])
    path.unlink(missing_ok=True)
    os.umask(0o077)
    with Server(str(path), Handler) as server:
        print(f"up in {time.monotonic() - began:.1f} s", flush=True)
        server.serve_forever()
