"""A small local server with the addresses of the Hugging Face Hub, from and to which its own client copies models."""

import base64
import hashlib
import http.server
import json
import re

from tests.testing.range_server import running

SHA = "c0ffee" + 34 * "0"  # of the only commit
CONVERTED_SHA = "decade" + 34 * "0"  # of the pull request that adds safetensors
CONVERTED = {
    "num": 15,
    "title": "Adding `safetensors` variant of this model",
    "author": {"name": "SFconvertbot"},
    "createdAt": "2023-01-01T00:00:00.000Z",
    "status": "open",
    "isPullRequest": True,
    "repo": {"name": "some-org/old", "type": "model"},
}


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves the folders ORG/NAME of `server.root` as models, at the addresses of the Hub.

    The folders ORG/NAME/pull-request are their pull requests.
    """

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        path, root = self.path.partition("?")[0], self.server.root
        discussed, about, listed, file = (
            re.fullmatch(pattern, path)
            for pattern in (
                r"/api/models/([\w-]+/[\w-]+)/discussions",
                r"/api/models/([\w-]+/[\w-]+)/revision/(main|refs%2Fpr%2F15)",
                rf"/api/models/([\w-]+/[\w-]+)/tree/({SHA}|{CONVERTED_SHA})",
                rf"/([\w-]+/[\w-]+)/resolve/({SHA}|{CONVERTED_SHA})/(.+)",
            )
        )
        found = next((found for found in (discussed, about, listed, file) if found), None)
        if found is None or not (root / found[1]).is_dir():
            return self.send(404, b"", {"X-Error-Code": "RepoNotFound"}, body)
        model = found[1]
        if discussed:
            return self.send(200, json.dumps({"discussions": [CONVERTED], "start": 0, "count": 1}).encode(), {}, body)
        sha = SHA if found[2] in ("main", SHA) else CONVERTED_SHA
        if sha == CONVERTED_SHA:
            model += "/pull-request"
        if file:
            data = (root / model / file[3]).read_bytes()
            self.server.given.append(file[3])
            etag = f'"{hashlib.sha1(data).hexdigest()}"'
            return self.send(200, data, {"ETag": etag, "X-Repo-Commit": sha}, body)
        files = [
            path
            for path in (root / model).rglob("*")
            if path.is_file() and (path.parent.name != "pull-request" or sha == CONVERTED_SHA)
        ]
        tree = [
            {
                "type": "file",
                "path": str(path.relative_to(root / model)),
                "size": path.stat().st_size,
                "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
            }
            for path in files
        ]
        self.send(200, json.dumps({"id": found[1], "sha": sha} if about else tree).encode(), {}, body)

    def do_POST(self):
        """Takes uploads: makes repositories, asks for every file within the commit, and writes the commit's files."""
        data, root = self.rfile.read(int(self.headers.get("Content-Length", 0))), self.server.root
        self.server.tokens.append(self.headers.get("Authorization"))
        if self.server.refuses:
            return self.send(401, b'{"error": "Invalid username or password."}', {}, True)
        made, preupload, commit = (
            re.fullmatch(pattern, self.path)
            for pattern in (
                r"/api/repos/create",
                r"/api/models/([\w-]+/[\w-]+)/preupload/main",
                r"/api/models/([\w-]+/[\w-]+)/commit/main",
            )
        )
        if made:
            wanted = json.loads(data)
            name = f"{wanted['organization']}/{wanted['name']}"
            (root / name).mkdir(parents=True, exist_ok=True)
            answer = {"url": f"http://{self.headers['Host']}/{name}", "name": name}
            self.server.made.append(wanted)
        elif preupload:
            files = [file["path"] for file in json.loads(data)["files"]]
            answer = {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files]}
        elif commit:
            for line in map(json.loads, data.splitlines()):
                if line["key"] == "file":
                    path = root / commit[1] / line["value"]["path"]
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(base64.b64decode(line["value"]["content"]))
            url = f"http://{self.headers['Host']}/{commit[1]}/commit/{SHA}"
            answer = {"commitUrl": url, "commitOid": SHA, "pullRequestUrl": None}
        else:  # /api/validate-yaml, which checks the head of a model card
            answer = {"errors": [], "warnings": []}
        self.send(200, json.dumps(answer).encode(), {}, True)

    def send(self, status: int, data: bytes, headers: dict, body: bool):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_):
        pass


def serve(root):
    """Serves the models below a folder within a context."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.root, server.given, server.made, server.tokens, server.refuses = root, [], [], [], False
    return running(server)
