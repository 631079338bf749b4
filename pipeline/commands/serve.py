"""`serve`: keeps one ring warm for ZeroMQ clients and, with `--http`, for HTTP clients."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.options import (
    Bits,
    ChatTemplateFile,
    ConfigFile,
    Context,
    Device,
    DeviceMemory,
    Memory,
    Model,
    Quality,
    Quiet,
    Settings,
    TimelineFile,
    Verify,
)
from pipeline.console import say
from pipeline.serving.endpoint import CurveKeys, check_endpoint, check_http, default_endpoint, make_keys
from pipeline.tracing.recording import Recording
from storage.errors import UsageError, reason

Endpoint = Annotated[
    str,
    typer.Option(
        help="Where ZeroMQ clients connect: ipc://PATH or tcp://HOST:PORT.",
        metavar="ADDRESS",
        show_default="a socket of this user's own",
    ),
]
Http = Annotated[
    str, typer.Option("--http", help="Also serve HTTP there, such as 127.0.0.1:8080.", metavar="HOST:PORT")
]
KeyDirectory = Annotated[
    Path | None,
    typer.Option(
        "--curve-keys",
        help="Directory of CURVE keys, as --make-keys writes it; needed beyond this machine.",
        metavar="DIR",
    ),
]
MakeKeys = Annotated[
    Path | None,
    typer.Option("--make-keys", help="Write CURVE keys for a server and a client, and end.", metavar="DIR"),
]
ApiKeyFile = Annotated[
    Path | None,
    typer.Option(
        help="File with the key that HTTP clients must send; needed beyond this machine.", metavar="FILE"
    ),
]


def command(
    model: Model = "",
    endpoint: Endpoint = "",
    http: Http = "",
    memory: Memory = "",
    device: Device = "",
    device_memory: DeviceMemory = "",
    bits: Bits = None,
    quality: Quality = "",
    verify: Verify = "",
    context_tokens: Context = 0,
    queue: Annotated[int, typer.Option(help="Requests that may wait; further ones are refused.", min=1)] = 64,
    deadline: Annotated[float, typer.Option(help="Seconds that one request may take.", min=0.001)] = 3600.0,
    max_message: Annotated[
        int,
        typer.Option(help="Bytes of the largest request; a larger one is refused.", min=1024, max=1 << 30),
    ] = 1 << 20,
    chat_template: ChatTemplateFile = None,
    reuse_prefix: Annotated[
        bool,
        typer.Option(
            "--reuse-prefix",
            help="Keep the last request's keys and values for a prompt that begins like it. That is faster, "
            "but the text may then depend on what was asked before.",
        ),
    ] = False,
    curve_keys: KeyDirectory = None,
    make_keys_in: MakeKeys = None,
    api_key_file: ApiKeyFile = None,
    config_file: ConfigFile = None,
    settings: Settings = None,
    timeline: TimelineFile = None,
    quiet: Quiet = False,
) -> None:
    """Serve a model to clients, until interrupted.

    One ring is kept warm, and answers one request after another. SECURITY.md says who may connect.
    """
    if make_keys_in is not None:
        for path in make_keys(make_keys_in):
            say(f"wrote {path}")
        return
    keys = _curve_keys(curve_keys)
    api_key = _read_key(api_key_file)
    address = endpoint or default_endpoint()
    if math.isnan(deadline):
        raise UsageError("--deadline takes a number of seconds")

    import uvloop

    from pipeline.serving.fronts import ServingOptions, check_http_packages, serve
    from pipeline.serving.opening import open_ring

    if http:
        check_http(http, api_key)
        check_http_packages()
    check_endpoint(address, keys)  # all before anything is loaded
    options = ServingOptions(
        endpoint=address,
        http=http,
        keys=keys,
        api_key=api_key,
        queue_limit=queue,
        longest=deadline,
        max_message=max_message,
    )
    with Recording(timeline, say) as recording:
        opened = open_ring(
            model,
            memory,
            context_tokens,
            config_file,
            settings or (),
            chat_template,
            reuse_prefix,
            say,
            bits,
            device,
            device_memory,
            quality,
            verify,
        )
        recording.of(opened.store, opened.plan)
        try:
            uvloop.run(serve(opened, options, say))
        finally:
            opened.ring.close()


def _curve_keys(directory: Path | None) -> CurveKeys | None:
    if directory is None:
        return None
    keys = CurveKeys(secret=directory / "server.key_secret", peers=directory / "clients")
    keys.own()
    if not keys.peers.is_dir():
        raise UsageError(f"{keys.peers}, the directory of the clients' public keys, is missing")
    return keys


def _read_key(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        key = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the API key {path} cannot be read: {reason(error)}") from error
    if len(key) < 16:
        raise UsageError(f"the API key in {path} has fewer than 16 characters")
    return key
