"""Runs a real nginx in front of a server: it strips one prefix and keeps another."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from vllm_avl.demo.server import free_port

START_SECONDS = 20.0
CONFIGURATION = """
{user}
daemon off;
pid {folder}/pid;
error_log {folder}/error.log;
events {{ }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{port};
        location {strips}/ {{ proxy_pass {upstream}/; }}
        location {keeps}/ {{ proxy_pass {upstream}; }}
    }}
}}
"""


@dataclass(frozen=True)
class Proxy:
    """A running nginx."""

    strips: str
    """Address under which the server's paths are asked for without the prefix."""
    keeps: str
    """Address under which they are asked for with it."""


def program() -> str | None:
    """Return nginx's path, None where there is none."""
    return shutil.which("nginx")


@contextmanager
def proxying(upstream: str, prefix: str, folder: Path) -> Iterator[Proxy]:
    """Serve `upstream` below two prefixes; the one that is kept is `prefix`."""
    path = program()
    assert path is not None
    port = free_port()
    file = folder / "nginx.conf"
    file.write_text(
        CONFIGURATION.format(
            user="user root;" if os.getuid() == 0 else "",
            folder=folder,
            port=port,
            strips="/stripped",
            keeps=prefix,
            upstream=upstream,
        )
    )
    process = subprocess.Popen([path, "-c", str(file), "-p", str(folder)])
    host = f"http://127.0.0.1:{port}"
    try:
        _wait(host, process)
        yield Proxy(f"{host}/stripped", f"{host}{prefix}")
    finally:
        process.terminate()
        process.wait(10)


def _wait(host: str, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + START_SECONDS
    while True:
        try:
            httpx.get(host)
            return
        except httpx.TransportError:
            assert process.poll() is None, "nginx ended"
            assert time.monotonic() < end, "nginx did not start"
            time.sleep(0.05)
