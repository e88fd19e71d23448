"""A stand-in for the Hugging Face Hub's upload endpoints, as huggingface_hub calls them with Xet switched off.

It checks the token, keeps what was uploaded, applies commits, and can be told to fail at one step.
"""

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_writer"
DROP, DROP_AFTER = "drop", "drop after"
STEPS = ("create", "info", "validate", "preupload", "lfs batch", "lfs upload", "commit")


@dataclass
class Repository:
    """Files of the one branch, and every commit's summary."""

    private: bool = False
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b"*.safetensors filter=lfs\n"})
    commits: list[dict] = field(default_factory=list)

    @property
    def head(self) -> str:
        return hashlib.sha1(str(len(self.commits)).encode()).hexdigest()


class HubServer:
    """Runs in a thread: `with HubServer() as hub: push(..., endpoint=hub.endpoint, token=TOKEN)`.

    Attributes:
        failures: what happens at a step instead: a status code, `DROP` (the connection), or, for "commit",
            `DROP_AFTER` (the commit is made, its answer lost).
        requests: (step, path) of every request.
        repositories: by id.
    """

    def __init__(self):
        self.failures: dict[str, int | str] = {}
        self.requests: list[tuple[str, str]] = []
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def steps(self) -> list[str]:
        """The steps requested so far, in order."""
        return [step for step, _ in self.requests]

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._serve()

    def do_POST(self):
        self._serve()

    def do_PUT(self):
        self._serve()

    def _serve(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunked_body()
        path = unquote(urlsplit(self.path).path)
        step = _step(self.command, path)
        self.hub.requests.append((step, path))
        failure = self.hub.failures.get(step)
        if failure == DROP:
            self.close_connection = True
            return
        # Uploads carry no token: their URL was given out for one file.
        if step != "lfs upload" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid username or password."})
        if isinstance(failure, int):
            return self._answer(failure, {"error": f"refused with {failure}"})
        if step in ("info", "preupload", "commit") and _repo_id(path) not in self.hub.repositories:
            return self._answer(404, {"error": "Repository not found"})
        status, answer = getattr(self, "_" + step.replace(" ", "_"))(path, body)
        if failure == DROP_AFTER:
            self.close_connection = True
            return
        self._answer(status, answer)

    def _chunked_body(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, status: int, values: dict) -> None:
        data = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if "error" in values:
            self.send_header("X-Error-Message", values["error"])
        self.end_headers()
        self.wfile.write(data)

    # ---- steps: (status, answer)

    def _create(self, path, body):
        asked = json.loads(body)
        repo_id = f"{asked['organization'] or 'writer'}/{asked['name']}"
        status = 409 if repo_id in self.hub.repositories else 200
        if status == 200:
            self.hub.repositories[repo_id] = Repository(private=asked.get("visibility") == "private")
        return status, {"url": f"{self.hub.endpoint}/{repo_id}"}

    def _info(self, path, body):
        repo_id = _repo_id(path)
        repository = self.hub.repositories[repo_id]
        return 200, {
            "id": repo_id,
            "sha": repository.head,
            "private": repository.private,
            "siblings": [{"rfilename": name} for name in repository.files],
        }

    def _validate(self, path, body):
        content = json.loads(body)["content"]
        errors = [] if content.startswith("---\n") else [{"message": "no front matter"}]
        return (400 if errors else 200), {"errors": errors, "warnings": []}

    def _preupload(self, path, body):
        files = self.hub.repositories[_repo_id(path)].files
        return 200, {"files": [_upload_mode(entry["path"], files) for entry in json.loads(body)["files"]]}

    def _lfs_batch(self, path, body):
        objects = []
        for entry in json.loads(body)["objects"]:
            upload = {"href": f"{self.hub.endpoint}/lfs/{entry['oid']}"}
            known = entry["oid"] in self.hub.blobs
            objects.append({**entry} if known else {**entry, "actions": {"upload": upload}})
        return 200, {"objects": objects, "transfer": "basic"}

    def _lfs_upload(self, path, body):
        oid = path.rpartition("/")[-1]
        if hashlib.sha256(body).hexdigest() != oid:
            return 400, {"error": "wrong content"}
        self.hub.blobs[oid] = body
        return 200, {}

    def _commit(self, path, body):
        repo_id = _repo_id(path)
        repository = self.hub.repositories[repo_id]
        header, *operations = [json.loads(line) for line in body.splitlines()]
        if header["value"].get("parentCommit") not in (None, repository.head):
            return 412, {"error": "A commit has happened since."}
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                repository.files[value["path"]] = self.hub.blobs[value["oid"]]
            elif operation["key"] == "deletedFile":
                del repository.files[value["path"]]
            else:
                return 400, {"error": f"unknown operation {operation['key']}"}
        repository.commits.append({**header["value"], "branch": path.rpartition("/")[-1]})
        url = f"{self.hub.endpoint}/{repo_id}/commit/{repository.head}"
        return 200, {"commitUrl": url, "commitOid": repository.head}


def _step(method: str, path: str) -> str:
    if method == "GET":
        return "info"
    if method == "PUT":
        return "lfs upload"
    parts = {
        "/api/repos/create": "create",
        "/api/validate-yaml": "validate",
        "/preupload/": "preupload",
        ".git/info/lfs/objects/batch": "lfs batch",
        "/commit/": "commit",
    }
    return next(step for part, step in parts.items() if part in path)


def _repo_id(path: str) -> str:
    """Of a path such as /api/models/owner/name/commit/main."""
    return "/".join(path.split("/")[3:5])


def _upload_mode(name: str, files: dict[str, bytes]) -> dict:
    """As the Hub's: weights by LFS, text in git; the id of the file that is there, so that it is not sent again."""
    large, there = name.endswith(".safetensors"), files.get(name)
    oid = None
    if there is not None:
        git_blob = b"blob %d\0" % len(there) + there
        oid = hashlib.sha256(there).hexdigest() if large else hashlib.sha1(git_blob).hexdigest()
    return {"path": name, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}
