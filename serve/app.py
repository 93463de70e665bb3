"""The Ray Serve application: replicas that each hold one engine, behind Ray's HTTP proxy.

`run_service` is `nexus-ray serve`. `build_app` is for Ray's own tools: `serve run serve/config.yaml` on one machine,
`serve deploy serve/config.yaml` on a cluster.
"""

from __future__ import annotations

import logging
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from nexus_ray.cluster import actor_options, ensure_ray, set_worker_threads
from nexus_ray.config import Config, Section, load_config
from nexus_ray.config.serving import ServeSection
from nexus_ray.errors import ConfigError, NexusError
from nexus_ray.generation.request import BASE
from nexus_ray.generation.serving import load_assistant, overlays_of, require_overlays
from nexus_ray.storage import PlaceField
from serve.api import build_api
from serve.guard.keys import KeyFile, keys_of_environment
from serve.service import Service

logger = logging.getLogger("nexus_ray.serve")
APP_NAME = "nexus-ray"
_MOST_QUEUED = 4096  # requests that a proxy holds for replicas that have no room even to refuse; then 503
_ROOM_FOR_REFUSALS = 1000  # requests a replica takes beyond its queue: it answers them at once, if only with 429


class BuilderArguments(Section):
    """`args` of the application in a Ray Serve configuration file."""

    config: Path
    overrides: tuple[str, ...] = ()


class Overlays(Section):
    """`user_config` of the deployment: what is served beside the base. Replicas take a new one without a pause."""

    overlays: dict[str, PlaceField]


@serve.deployment(name="chat", max_constructor_retry_count=1)
@serve.ingress()
class ChatReplica:
    """One loaded base with its overlays, and its HTTP interface."""

    def __init__(self, config: Config, keys: dict[str, str]) -> None:
        set_worker_threads(config.resources)
        _log_to_stderr()
        self._section = config.serve
        self._configured = False
        self._keys = KeyFile(config.serve.api_keys, keys)
        self._assistant = load_assistant(config, {})
        self._service = Service(self._assistant, config.data.sequence_length, config.serve.request_timeout_s)

    def __serve_build_asgi_app__(self) -> FastAPI:  # Ray Serve's name
        section = self._section
        return build_api(
            self._service, keys=self._keys, max_body_bytes=section.max_body_bytes, log_text=section.log_text
        )

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve these overlays from now on (Ray Serve's name); answers that are under way end as they began.

        Ray Serve stops a replica that fails here. So one that serves already keeps the overlays that it has where it
        cannot have the new ones, and says so in /healthz and its log; only a new one fails.
        """
        try:
            overlays = Overlays.model_validate(user_config).overlays
            require_overlays(overlays)
            self._assistant.engine.serve(overlays)
        except Exception as error:  # whatever it is, the overlays that work are not to go with it
            if not self._configured:
                raise
            logger.exception("the new overlays are refused, the old ones stay")
            self._service.problem = f"the newest overlays are refused: {error}"
        else:
            self._configured, self._service.problem = True, None

    def check_health(self) -> None:
        """Fail when the engine is stuck (Ray Serve's name): the replica is replaced then."""
        self._assistant.engine.check()


def build_app(args: dict[str, Any]) -> Application:
    """Build the application from `args` of a Ray Serve configuration file: `config` and `overrides`.

    Raises:
        ConfigError: the configuration is wrong.
        ArtefactError: the run has no trained overlay.
    """
    try:
        arguments = BuilderArguments.model_validate(args)
    except ValueError as error:
        raise ConfigError(f"args of the Serve application: {error}", "give config: FILE and overrides: []") from error
    return application(load_config(arguments.config, arguments.overrides))


def application(config: Config) -> Application:
    """The application of a run.

    Raises:
        ConfigError: two models have one name, or an API key is garbled.
        ArtefactError: the run has no trained overlay.
    """
    overlays = overlays_of(config)
    keys = keys_of_environment()
    KeyFile(config.serve.api_keys, keys)  # refuse here, not in a replica
    deployment: Any = ChatReplica
    bound: Application = deployment.options(
        **_scale(config.serve),
        user_config={"overlays": {name: str(path.resolve()) for name, path in overlays.items()}},
        ray_actor_options=actor_options(config.resources),
        max_queued_requests=_MOST_QUEUED,
        max_ongoing_requests=config.serve.max_concurrent_requests + _ROOM_FOR_REFUSALS,
        graceful_shutdown_timeout_s=config.serve.drain_seconds,
    ).bind(config, keys)
    return bound


def _scale(section: ServeSection) -> dict[str, Any]:
    if section.max_replicas is None:
        return {"num_replicas": section.replicas}
    scaling = {
        "min_replicas": section.replicas,
        "max_replicas": section.max_replicas,
        "target_ongoing_requests": section.target_ongoing_requests,
    }
    return {"autoscaling_config": scaling}


def run_service(config: Config, *, blocking: bool = True) -> None:
    """Start the service, wait until it answers, and keep it up until Ctrl-C or SIGTERM.

    Args:
        config: the run to serve.
        blocking: return once the service is up when false; `stop_service` ends it.

    Raises:
        ConfigError: the port is taken or the host is not this machine's.
        ArtefactError: the run has no trained overlay.
        NexusError: a replica cannot start.
    """
    app = application(config)
    ensure_ray()
    started_here = not serve.status().proxies
    if started_here:
        _require_free(config.serve.host, config.serve.port)
    with _terminable():
        try:
            _deploy(app, config)
            if blocking:
                threading.Event().wait()
        except KeyboardInterrupt:
            logger.info("stopping the service")
            stop_service(everything=started_here)
        except BaseException:
            stop_service(everything=started_here)
            raise


def stop_service(*, everything: bool = True) -> None:
    """Take the service down, and with `everything` Ray Serve too."""
    if everything:
        serve.shutdown()
    else:
        serve.delete(APP_NAME)


def _deploy(app: Application, config: Config) -> None:
    _quiet_serve()
    serve.start(http_options={"host": config.serve.host, "port": config.serve.port})
    logger.info("loading the model in %d replica(s)", config.serve.replicas)
    try:
        serve.run(app, name=APP_NAME, route_prefix="/")
    except RuntimeError as error:
        raise _deployment_error(error) from error
    _announce(config)


def _announce(config: Config) -> None:
    host = "localhost" if config.serve.host in ("0.0.0.0", "::") else config.serve.host
    address = f"http://{f'[{host}]' if ':' in host else host}:{config.serve.port}"
    url = f"{address}/v1"
    name, *others = overlays_of(config)
    models = ", ".join(map(repr, (BASE, name, *others)))
    logger.info("serving %s; page: %s/ API: %s metrics: %s/metrics; Ctrl-C stops", models, address, url, address)
    if not _is_loopback(config.serve.host) and not _has_keys(config):
        logger.warning("anybody who reaches %s can use it: no API key is set (serve.api_keys)", config.serve.host)
    body = f'{{"model": "{name}", "messages": [{{"role": "user", "content": "Good morrow!"}}]}}'
    logger.info("try: curl %s/chat/completions -H 'Content-Type: application/json' -d '%s'", url, body)


def _is_loopback(host: str) -> bool:
    return host == "localhost" or host == "::1" or host.startswith("127.")


def _has_keys(config: Config) -> bool:
    return KeyFile(config.serve.api_keys, keys_of_environment()).required


def _deployment_error(error: RuntimeError) -> NexusError:
    """The reason a replica gave, out of the remote traceback in Ray's message."""
    status = serve.status().applications.get(APP_NAME)
    details = [str(error), *([item.message for item in status.deployments.values()] if status else [])]
    lines = [line.strip() for text in details for line in text.splitlines() if line.strip()]
    reasons = [line for line in lines if line.startswith(("nexus_ray.errors.", "nexus_ray.generation."))]
    hint = "`--verbose` shows the replicas' log; see also `serve status`"
    return NexusError(f"the service did not start: {reasons[-1] if reasons else lines[-1]}", hint)


def _require_free(host: str, port: int) -> None:
    """Find out before any model is loaded that the proxy could not listen.

    Raises:
        ConfigError: it could not.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror or error}", "choose another with serve.port=PORT"
        ) from error


@contextmanager
def _terminable() -> Iterator[None]:
    """Within the block SIGTERM does what Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _log_to_stderr() -> None:
    """Let a replica's access log through: Ray takes what is written to stderr into its log files."""
    access = logging.getLogger("nexus_ray.serve.access")
    access.setLevel(logging.INFO)
    if not access.handlers:
        access.addHandler(logging.StreamHandler())
        access.propagate = False


def _quiet_serve() -> None:
    """Serve logs every state change; ours are the lines that a person wants."""
    if not logger.isEnabledFor(logging.DEBUG):
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
