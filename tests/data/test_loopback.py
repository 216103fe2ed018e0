"""Downloading and streaming through the real client of the Hub, from a server on this machine.

The client reads the address of the Hub when it is imported, so that a second Python does the loading.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

SAMPLE = Path(__file__).parent / "samples" / "ultraeditbench"
REPO = "XiaojieGu/UltraEditBench"
COMMIT = "b" * 40
CODE = """
import json
from hf_kedit.data import load_edit_dataset, load_report
from hf_kedit.errors import DataError
stream = load_edit_dataset("ultraeditbench", streaming=True)
streamed = [row["prompt"] for row in stream]
table = load_edit_dataset("ultraeditbench")
try:
    load_edit_dataset("qaedit")
except DataError as error:
    said = str(error)
print(json.dumps({
    "streamed": streamed, "loaded": table["prompt"][:], "said": said,
    "stream": load_report(stream).files, "revisions": [load_report(stream).revision, load_report(table).revision],
}))
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """The few answers that the client asks for, about one repository."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        files = {p.name: p.read_bytes() for p in SAMPLE.iterdir()}
        name = path.rsplit("/", 1)[1]
        if path.startswith(f"/api/datasets/{REPO}/tree/"):
            self.answer(200, json.dumps([self.entry(n, body) for n, body in files.items()]).encode())
        elif path.startswith(f"/api/datasets/{REPO}"):
            about = {"id": REPO, "sha": COMMIT, "siblings": [{"rfilename": n} for n in files], "tags": []}
            self.answer(200, json.dumps(about).encode())
        elif path.startswith(f"/datasets/{REPO}/resolve/") and name in files:
            body, status, headers = files[name], 200, {"ETag": f'"{hashlib.sha1(files[name]).hexdigest()}"'}
            wanted = self.headers.get("Range")
            if wanted and self.command == "GET":
                first, last = (int(n) for n in wanted.removeprefix("bytes=").split("-"))
                headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
                body, status = body[first : last + 1], 206
            self.answer(status, body, {**headers, "X-Repo-Commit": COMMIT})
        else:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound" if REPO in path else "RepoNotFound"})

    @staticmethod
    def entry(name: str, body: bytes) -> dict[str, object]:
        return {"type": "file", "path": name, "size": len(body), "oid": "0" * 40}

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture
def endpoint() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.hub
def test_download_and_stream(endpoint: str, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_TOKEN", "http_proxy")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}
    run = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    rows = json.loads((SAMPLE / "UltraEditBench_2M.json").read_text(encoding="utf-8"))
    assert found["streamed"] == found["loaded"] == [row["prompt"] for row in rows]
    assert found["stream"] == [f"hf://datasets/{REPO}@{COMMIT}/UltraEditBench_2M.json"]
    assert found["revisions"] == [COMMIT, COMMIT]
    assert "no such repository" in found["said"] and "path=" in found["said"]
