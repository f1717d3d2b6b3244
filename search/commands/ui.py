"""`python -m search ui`: MLflow's UI for a folder of searches."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import quote

from search.commands.libraries import set_up_libraries
from search.config.command_lines import command_line
from search.results.folders import StoreError
from search.results.store import SearchFolder, find_search
from search.tracking.store import MODE, PAGE, Tracking, quiet, remembered
from spaces.errors import UserError

HOST = "127.0.0.1"
_PATIENCE_S = 90
_LOG = "mlflow-server.log"


def serve(name: str | None, runs: Path, port: int, tracking_uri: str | None = None) -> int:
    """Serves the UI until interrupted, or prints the links of an existing server; returns the exit code.

    Raises:
        StoreError: nothing has been logged yet.
        UserError: the port is in use, or the server did not start or does not answer.
    """
    set_up_libraries()
    folder = find_search(runs, name)
    tracking = Tracking.of(runs, tracking_uri, remembered(folder.open()))
    if tracking.web:
        sys.stdout.write("\n".join([*_links(tracking, folder, tracking.web), ""]))
        return 0
    _check_port(port)
    database = tracking.uri.partition(":///")[2]
    if tracking.uri.startswith("sqlite:") and not Path(database).is_file():
        raise StoreError(f"nothing has been logged in {runs} yet; run: python -m search")
    links = _links(tracking, folder, f"http://{HOST}:{port}")
    server = _start(tracking, runs, port)
    try:
        _wait_for(server, runs, port)
        sys.stdout.write("\n".join([*links, "Ctrl-C ends it.", ""]))
        sys.stdout.flush()
        return server.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        _stop(server)


def _links(tracking: Tracking, folder: SearchFolder, base: str) -> list[str]:
    """Returns links to the search, one per line: its summary, report, charts, and picked version."""
    search = folder.name
    try:
        with quiet():
            client = tracking.client()
            experiments = [experiment.experiment_id for experiment in client.search_experiments()]
            query = f"tags.search = '{search}' and tags.role = 'summary'"
            summaries = client.search_runs(experiments, query, max_results=1)
            models = {model.name for model in client.search_registered_models()}
            study = client.get_experiment(summaries[0].info.experiment_id).name if summaries else ""
    except Exception as error:  # MLflow has no common class for what may be wrong with it
        raise UserError(f"the UI needs MLflow to answer, got {tracking.shown} ({error}); start its server") from error
    if not summaries:
        sync = command_line("sync", search=folder.path)
        return [f"{base}/#/{MODE}", f"The search is not there as a whole yet: {sync}"]
    summary = summaries[0].info
    runs = f"{base}/#/experiments/{summary.experiment_id}/runs"
    front = quote(f"tags.search = '{search}' and tags.front = 'true'")
    lines = [
        f"Front of {search}, with links to its trials:  {runs}/{summary.run_id}{MODE}",
        f"Its report with all pictures:  {runs}/{summary.run_id}/artifacts/{PAGE}{MODE}",
        f"Its front as charts:  {runs}{MODE}&compareRunsMode=CHART&searchFilter={front}",
    ]
    return [*lines, f"The picked version:  {base}/#/models/{study}{MODE}"] if study in models else lines


def _start(tracking: Tracking, runs: Path, port: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", tracking.uri]
    command += ["--host", HOST, "--port", str(port), "--workers", "1", "--uvicorn-opts", "--log-level=error"]
    # MLflow's job workers are not used and would take a gigabyte.
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
