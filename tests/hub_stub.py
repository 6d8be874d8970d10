"""The few addresses of the Hugging Face hub that its clients ask for one data set or one model, on loopback."""

import base64
import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

SHA = "a" * 40


class Hub(ThreadingHTTPServer):
    """`commits` are the files of the data set `name` by commit, of which `head` is that of all branches and tags;
    `files` are those of the first. `sent` are files that were committed to models, and `asked` the requests. Without
    the token `token` nothing may be written."""

    daemon_threads = True

    def __init__(self, name="", files=None, token="hf_test"):
        super().__init__(("127.0.0.1", 0), Handler)
        self.name = name
        self.commits = {SHA: dict(files or {})}
        self.head = SHA
        self.token = token
        self.sent = {}
        self.made = []
        self.asked = []

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"


@contextlib.contextmanager
def serving(**what):
    hub = Hub(**what)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers = {"Content-Type": "application/json"} | headers
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub = self.server
        path = unquote(urlsplit(self.path).path)
        hub.asked.append(f"{self.command} {self.path}")
        api = f"/api/datasets/{hub.name}"
        if path.startswith(f"{api}/tree/"):
            revision, _, inside = path.removeprefix(f"{api}/tree/").partition("/")
            inside = inside.strip("/")
            is_deep = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() == "true"
            found = self.listed(self.files(revision), f"{inside}/" if inside else "", is_deep)
            return self.answer(200 if found else 404, found, X_Error_Code="" if found else "EntryNotFound")
        if path == api or path.startswith(f"{api}/revision/"):
            revision = path.removeprefix(api).removeprefix("/revision/")
            siblings = [{"rfilename": name} for name in self.files(revision)]
            sha = self.commit(revision)
            info = {"_id": "0", "id": hub.name, "sha": sha, "private": False, "tags": [], "siblings": siblings}
            return self.answer(200, {**info, "downloads": 0, "likes": 0, "gated": False, "disabled": False})
        if path.startswith(f"/datasets/{hub.name}/resolve/"):
            revision, _, name = path.removeprefix(f"/datasets/{hub.name}/resolve/").partition("/")
            commit = self.commit(revision)
            if name in self.files(revision):
                return self.file(self.files(revision)[name], commit)
            return self.answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        return self.answer(404, {"error": "not found"}, X_Error_Code="RepoNotFound")

    def commit(self, revision):
        return revision if revision in self.server.commits else self.server.head

    def files(self, revision):
        return self.server.commits[self.commit(revision)]

    def listed(self, files, inside, is_deep):
        """Entries of a folder, and with `is_deep` of all that are in it."""
        found = {}
        for name in files:
            if name.startswith(inside):
                parts = name.removeprefix(inside).split("/")
                for depth in range(1, len(parts)):
                    folder = inside + "/".join(parts[:depth])
                    if depth == 1 or is_deep:
                        found[folder] = {"type": "directory", "path": folder, "oid": SHA, "size": 0}
                if len(parts) == 1 or is_deep:
                    found[name] = self.entry(name, files[name])
        return list(found.values())

    def entry(self, name, content):
        oid = hashlib.sha1(content).hexdigest()
        return {"type": "file", "path": name, "size": len(content), "oid": oid}

    def file(self, content, commit):
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X_Repo_Commit": commit, "Accept_Ranges": "bytes"}
        asked = self.headers.get("Range")
        if not asked:
            return self.answer(200, content, **headers)
        first, _, last = asked.removeprefix("bytes=").partition("-")
        end = min(int(last or len(content) - 1), len(content) - 1)
        part = content[int(first) : end + 1]
        return self.answer(206, part, Content_Range=f"bytes {first}-{end}/{len(content)}", **headers)

    def do_POST(self):
        hub = self.server
        path = unquote(urlsplit(self.path).path)
        body = self.body()
        hub.asked.append(f"POST {self.path}")
        if path.startswith(f"/api/datasets/{hub.name}/paths-info/"):
            is_json = self.headers.get("Content-Type", "").startswith("application/json")
            wanted = json.loads(body)["paths"] if is_json else parse_qs(body.decode())["paths"]
            files = self.files(path.removeprefix(f"/api/datasets/{hub.name}/paths-info/"))
            return self.answer(200, [self.entry(name, files[name]) for name in wanted if name in files])
        if self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self.answer(401, {"error": "Invalid username or password."}, X_Error_Message="Invalid token")
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            hub.made.append((name, asked))
            return self.answer(200, {"url": f"{hub.address}/{name}", "name": name})
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if "/preupload/" in path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for file in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files, "commitOid": SHA})
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    hub.sent[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            name = path.removeprefix("/api/models/").partition("/commit/")[0]
            url = f"{hub.address}/{name}/commit/{SHA}"
            return self.answer(200, {"success": True, "commitOid": SHA, "commitUrl": url})
        return self.answer(404, {"error": "not found"})
