"""A finished run's discriminator as a scoring endpoint of its own: `POST /v1/score` behind a bearer token.

    export RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=services.endpoint:proxy_middleware
    RLGAF_SCORE_TOKEN=... serve run services.serving:app run=/shared/runs/NAME

The same replicas as in training answer, with the one version that the run ended with. The variable puts the
endpoint's limits into Ray's proxies too, which otherwise hold any body whole before they ask the endpoint.
"""

import os
import tomllib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, PositiveInt
from ray import serve
from starlette.types import ASGIApp

from discriminator.exported import exported_state, read_exported
from discriminator.versions import UnknownVersion
from services.config import ConfigError
from services.endpoint import OPEN_REQUESTS, endpoint_app
from services.scoring import DEPLOYMENT, scoring_app


class Arguments(BaseModel):
    """Arguments of `app`; what is left out is as the run was configured."""

    model_config = ConfigDict(extra="forbid")

    run: Path
    """The run's folder, on a path that every node sees."""
    model: str = ""
    """Hub name or folder of the body, where it is not what the run's config.toml calls it."""
    replicas: PositiveInt | None = None
    """Replicas."""
    cpus: float | None = None
    """Logical CPUs per replica; whole ones are its threads."""
    gpu: bool = False
    """Give each replica a GPU."""


class ExportedVersion:
    """The one version in a folder that a run left (see `services.scoring.Versions`)."""

    def __init__(self, folder: Path, version: int, checksum: str) -> None:
        self.folder = folder
        self.version = version
        self.checksum = checksum

    def fetch(self, version: int) -> tuple[str, Any]:
        """Checksum and state. Raises UnknownVersion for any other version."""
        if version != self.version:
            raise UnknownVersion(f"{self.folder} holds version {self.version}")
        return self.checksum, exported_state(self.folder)

    async def newest(self) -> int:
        """The version there is."""
        return self.version

    async def alive(self) -> None:
        """A folder asks nobody."""


def app(args: Arguments) -> serve.Application:
    """The application, for `serve run` and for a Serve configuration file.

    Raises:
        ConfigError: no token is set, or the run has no discriminator to serve.
    """
    folder = args.run / "discriminator"
    try:
        exported = read_exported(folder)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(str(error)) from None
    variable = exported.config.scoring.http_token
    token = os.environ.get(variable, "")
    if not token:
        raise ConfigError(f"set the variable {variable}: requests must bring it as their bearer token")
    given = {"replicas": args.replicas, "cpus": args.cpus}
    scoring = exported.config.scoring.model_copy(
        update={"http": True} | {name: value for name, value in given.items() if value is not None}
    )
    replicas = scoring_app(
        exported.config.model_copy(update={"scoring": scoring, "device": "cuda" if args.gpu else "cpu"}),
        args.model or exported.model or _body_of(args.run),
        exported.model_dtype,
        ExportedVersion(folder, exported.version, exported.checksum),
        threads=max(1, int(scoring.cpus)),
        use_gpu=args.gpu,
    )

    def build() -> ASGIApp:
        handle = serve.get_deployment_handle(DEPLOYMENT, serve.get_replica_context().app_name)
        return endpoint_app(handle, scoring.replicas, token)

    front = serve.deployment(
        name="endpoint", max_ongoing_requests=4 * OPEN_REQUESTS, ray_actor_options={"num_cpus": 0}
    )
    return front(serve.ingress(build)()).bind(replicas)


def _body_of(run: Path) -> str:
    """Folder of the body of a run that began with one."""
    try:
        said = tomllib.loads((run / "config.toml").read_text())
    except OSError:
        raise ConfigError(
            f"{run} has no config.toml: name the discriminator's body, as in model=/models/x"
        ) from None
    body: str = said["discriminator"]["model"] or said["policy"]["model"]
    return body
