"""MLflow's UI on a run directory."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import quote

from search.store import StoreError, find_search
from spaces.errors import UserError

HOST = "127.0.0.1"
_PATIENCE_S = 90
_LOG = "mlflow-server.log"


def serve(name: str | None, runs: Path, port: int) -> int:
    """Serves the UI until it is interrupted; returns the exit code.

    Raises:
        StoreError: nothing has been logged yet.
        UserError: the port is in use, or the server did not start.
    """
    folder = find_search(runs, name)
    folder.open()
    _check_port(port)
    links = _links(runs, folder.name, port)
    server = _start(runs, port)
    try:
        _wait_for(server, runs, port)
        sys.stdout.write("\n".join([*links, "Ctrl-C ends it.", ""]))
        sys.stdout.flush()
        return server.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        _stop(server)


def _links(runs: Path, search: str, port: int) -> list[str]:
    from mlflow import MlflowClient

    from search.tracking import DATABASE, tracking_uri

    if not (runs / DATABASE).is_file():
        raise StoreError(f"nothing has been logged in {runs} yet; run: python -m search")
    client = MlflowClient(tracking_uri(runs))
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = client.search_runs(experiments, f"tags.search = '{search}' and tags.role = 'summary'", max_results=1)
    if not found:
        return [f"http://{HOST}:{port}/"]
    summary = found[0].info
    base = f"http://{HOST}:{port}/#/experiments/{summary.experiment_id}/runs"
    front = quote(f"tags.search = '{search}' and tags.front = 'true'")
    return [
        f"Front of {search}:  {base}/{summary.run_id}/artifacts/front.html",
        f"Its trials as charts:  {base}?workflowType=machine_learning&compareRunsMode=CHART&searchFilter={front}",
    ]


def _start(runs: Path, port: int) -> subprocess.Popen[bytes]:
    from search.tracking import tracking_uri

    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", tracking_uri(runs)]
    command += ["--host", HOST, "--port", str(port), "--workers", "1", "--uvicorn-opts", "--log-level=error"]
    # MLflow's job workers would take a gigabyte, and nothing here uses them.
    settings = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_LOGGING_LEVEL": "ERROR"}
    settings |= {"PYTHONWARNINGS": "ignore"}
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # A session of its own: Ctrl-C then reaches us alone, and we end the server and its children together.
    with (runs / _LOG).open("w") as log:
        return subprocess.Popen(command, env=os.environ | settings, start_new_session=True, stdout=log, stderr=log)


def _wait_for(server: subprocess.Popen[bytes], runs: Path, port: int) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline and server.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex((HOST, port)) == 0:
                return
        time.sleep(0.2)
    raise UserError(f"MLflow's server answers on port {port}, got none; its own words are in {runs / _LOG}")


def _stop(server: subprocess.Popen[bytes]) -> None:
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, how)
            server.wait(5)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            raise UserError(f"the UI needs a free port, got {port}, which is in use; give another --port") from None
