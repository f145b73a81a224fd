"""A hub on the loopback: as much of the Hugging Face hub's HTTP interface as downloads and pins of small files need."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse


class StubHub:
    """Serves `repositories[id][commit][file] = bytes`; the last commit of an id is its default branch.

    `gated` ids answer 403. `cut[file] = n`: the next n downloads of a file stop half way. `broken` files answer
    500. `requests` lists (method, path, Range header) of what was asked.
    """

    def __init__(self, repositories):
        self.repositories = repositories
        self.gated, self.broken, self.cut = set(), set(), {}
        self.requests = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def downloads(self):
        """Names of the files that were downloaded, in order, one for each request."""
        return [path.rsplit("/", 1)[-1] for method, path, _ in self.requests if method == "GET" and "/resolve/" in path]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: StubHub

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlparse(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        parts = path.strip("/").split("/")
        if parts[0] == "api":
            self._api(parts[1:])
        else:
            parts = parts[1:] if parts[0] == "datasets" else parts
            self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))

    def _api(self, parts):
        id, what = "/".join(parts[1:3]), parts[3:]
        commits = self._commits(id)
        if commits is None:
            return
        default = list(commits)[-1]
        asked = what[1] if len(what) > 1 else default
        commit = default if asked == "main" else asked
        if commit not in commits:
            self._error(404, "RevisionNotFound")
        elif what[:1] == ["tree"]:
            files = commits[commit].items()
            self._json([{"type": "file", "path": n, "size": len(b), "oid": _etag(b)} for n, b in files])
        else:
            self._json({"_id": "0", "id": id, "sha": commit, "siblings": [{"rfilename": n} for n in commits[commit]]})

    def _file(self, id, commit, name):
        commits = self._commits(id)
        if commits is None:
            return
        if commit not in commits:
            self._error(404, "RevisionNotFound")
        elif name not in commits[commit]:
            self._error(404, "EntryNotFound")
        elif name in self.hub.broken and self.command == "GET":
            self._error(500, "ServerError")
        else:
            self._send(name, commits[commit][name], commit)

    def _send(self, name, body, commit):
        first = 0
        if wanted := self.headers.get("Range"):
            first = int(wanted.removeprefix("bytes=").split("-")[0])
        self.send_response(206 if first else 200)
        self.send_header("ETag", f'"{_etag(body)}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(body) - first))
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        rest = body[first:]
        if self.hub.cut.get(name, 0) > 0:
            self.hub.cut[name] -= 1
            self.wfile.write(rest[: len(rest) // 2])
            self.close_connection = True
        else:
            self.wfile.write(rest)

    def _commits(self, id):
        if id in self.hub.gated:
            self._error(403, "GatedRepo")
        elif id not in self.hub.repositories:
            self._error(404, "RepoNotFound")
        else:
            return self.hub.repositories[id]
        return None

    def _json(self, document):
        body = json.dumps(document).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _error(self, status, code):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _etag(body):
    return hashlib.sha1(body).hexdigest()
