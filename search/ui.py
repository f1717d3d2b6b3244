"""MLflow's UI on a run directory."""

import socket
import subprocess
import sys
from pathlib import Path

from search.store import StoreError, find_search
from spaces.errors import UserError


def serve(name: str | None, runs: Path, port: int) -> int:
    """Serves the UI until it is interrupted; returns the exit code.

    Raises:
        StoreError: nothing has been logged yet.
        UserError: the port is in use.
    """
    folder = find_search(runs, name)
    folder.open()
    _check_port(port)
    from mlflow import MlflowClient

    from search.tracking import DATABASE, tracking_uri

    if not (runs / DATABASE).is_file():
        raise StoreError(f"nothing has been logged in {runs} yet; run: python -m search")
    query = f"tags.search = '{folder.name}'"
    client = MlflowClient(tracking_uri(runs))
    logged = client.search_runs([item.experiment_id for item in client.search_experiments()], query, max_results=1)
    page = f"#/experiments/{logged[0].info.experiment_id}/runs?compareRunsMode=CHART" if logged else ""
    sys.stdout.write(f"Charts of {folder.name}: http://127.0.0.1:{port}/{page}\nCtrl-C ends it.\n")
    sys.stdout.flush()
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", tracking_uri(runs)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    try:
        return subprocess.run(command, check=False).returncode
    except KeyboardInterrupt:
        return 0


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise UserError(f"the UI needs a free port, got {port}, which is in use; give another --port") from None
