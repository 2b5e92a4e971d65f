"""What gcsfs and TensorStore use of Google Cloud Storage's JSON API, served on the loopback from memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass(frozen=True)
class Object:
    content: bytes
    generation: int

    def about(self, bucket: str, name: str) -> dict:
        return {
            "kind": "storage#object",
            "bucket": bucket,
            "name": name,
            "size": str(len(self.content)),
            "generation": str(self.generation),
            "md5Hash": base64.b64encode(hashlib.md5(self.content).digest()).decode(),
            "updated": "2026-01-01T00:00:00Z",
            "timeCreated": "2026-01-01T00:00:00Z",
        }


class StorageServer(ThreadingHTTPServer):
    """`buckets[bucket][name]` are the objects; the server runs in a thread within a `with`."""

    daemon_threads = True

    def __init__(self, *buckets: str):
        super().__init__(("127.0.0.1", 0), Handler)
        self.buckets: dict[str, dict[str, Object]] = {bucket: {} for bucket in buckets}
        self.uploads: dict[str, tuple[str, str, bytearray]] = {}
        self.lock, self.generation = threading.RLock(), 0
        self.refuses = False  # to write
        self.unreadable = ""  # the end of the name of an object whose content is refused

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """With which gcsfs and TensorStore use this server."""
        return {
            "STORAGE_EMULATOR_HOST": self.address,  # gcsfs
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks Google's servers of what kind a bucket is
            "TENSORSTORE_GCS_HTTP_URL": self.address,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "any",
        }

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """A client that was killed has closed its end."""

    def put(self, bucket: str, name: str, content: bytes) -> dict:
        with self.lock:
            self.generation += 1
            self.buckets[bucket][name] = Object(bytes(content), self.generation)
            return self.buckets[bucket][name].about(bucket, name)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StorageServer

    def log_message(self, *_):
        pass

    def answer(self, code: int, value: object = b"", **headers: object) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(code)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), str(text))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def handle_any(self) -> None:
        url = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.refuses and self.command != "GET":
            self.answer(403, {"error": {"code": 403, "message": "may not write"}})
        elif match := re.fullmatch(
            r"/(?:download/)?storage/v1/b/([^/]+)(/o(?:/([^/]*)(/rewriteTo/.*)?)?/?)?", url.path
        ):
            bucket, below, name, target = match.groups()
            if bucket not in self.server.buckets:
                self.answer(404, {"error": {"code": 404, "message": f"no bucket {bucket}"}})
            elif not below:
                self.answer(200, {"kind": "storage#bucket", "name": bucket})
            elif not name:
                self.listing(bucket, query)
            else:
                self.object(bucket, unquote(name), query, target, "download" in url.path)
        elif match := re.fullmatch(r"/upload/storage/v1/b/([^/]+)/o", url.path):
            self.upload(match[1], query, body)
        elif url.path == "/batch/storage/v1":
            self.batch(body.decode())
        else:
            self.answer(501, {"error": {"code": 501, "message": self.path}})

    do_GET = do_POST = do_PUT = do_DELETE = handle_any

    def listing(self, bucket: str, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        items, prefixes = [], set()
        with self.server.lock:
            for name, one in sorted(self.server.buckets[bucket].items()):
                if not name.startswith(prefix) or not query.get("startOffset", "") <= name:
                    continue
                if "endOffset" in query and name >= query["endOffset"]:
                    continue
                head, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
                if found:
                    prefixes.add(prefix + head + delimiter)
                else:
                    items.append(one.about(bucket, name))
        self.answer(200, {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)})

    def object(self, bucket: str, name: str, query: dict[str, str], target: str | None, download: bool) -> None:
        with self.server.lock:
            one = self.server.buckets[bucket].get(name)
            wanted, known = query.get("ifGenerationMatch"), query.get("ifGenerationNotMatch")
            generation = str(one.generation if one else 0)
            if one is None:
                self.answer(404, {"error": {"code": 404, "message": f"no object {name}"}})
            elif wanted not in (None, generation):
                self.answer(412, {"error": {"code": 412, "message": "another generation"}})
            elif self.command == "DELETE":
                del self.server.buckets[bucket][name]
                self.answer(204)
            elif target:
                bucket, _, name = target.removeprefix("/rewriteTo/b/").partition("/o/")
                about = self.server.put(bucket, unquote(name), one.content)
                self.answer(200, {"done": True, "resource": about})
            elif not download and query.get("alt") != "media":
                self.answer(200, one.about(bucket, name))
            elif self.server.unreadable and name.endswith(self.server.unreadable):
                self.answer(403, {"error": {"code": 403, "message": "may not read"}})
            elif known == generation:
                self.answer(304)
            else:
                self.content(one)

    def content(self, one: Object) -> None:
        size, wanted = len(one.content), re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        headers = {"x_goog_generation": one.generation}
        if not wanted:
            self.answer(200, one.content, **headers)
            return
        if wanted[1]:
            first, last = int(wanted[1]), min(int(wanted[2] or size), size - 1)
        else:
            first, last = max(0, size - int(wanted[2])), size - 1
        if first >= size:
            self.answer(416, Content_Range=f"bytes */{size}", **headers)
        else:
            headers["Content_Range"] = f"bytes {first}-{last}/{size}"
            self.answer(206, one.content[first : last + 1], **headers)

    def upload(self, bucket: str, query: dict[str, str], body: bytes) -> None:
        kind, name = query.get("uploadType"), query.get("name", "")
        with self.server.lock:
            if bucket not in self.server.buckets:
                self.answer(404, {"error": {"code": 404, "message": f"no bucket {bucket}"}})
            elif "upload_id" in query:
                self.resume(query["upload_id"], body)
            elif kind == "resumable":
                number = str(len(self.server.uploads))
                name = name or json.loads(body)["name"]
                self.server.uploads[number] = (bucket, name, bytearray())
                place = f"{self.server.address}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={number}"
                self.answer(200, Location=place)
            else:
                if kind == "multipart":
                    boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
                    head, _, rest = body.partition(b"--" + boundary)[2].partition(b"\n--" + boundary)
                    name = json.loads(re.split(rb"\r?\n\r?\n", head, maxsplit=1)[1])["name"]
                    body = re.split(rb"\r?\n\r?\n", rest, maxsplit=1)[1].rpartition(b"\n--" + boundary)[0]
                one = self.server.buckets[bucket].get(name)
                if query.get("ifGenerationMatch") not in (None, str(one.generation if one else 0)):
                    self.answer(412, {"error": {"code": 412, "message": "another generation"}})
                else:
                    self.answer(200, self.server.put(bucket, name, body))

    def resume(self, number: str, body: bytes) -> None:
        bucket, name, content = self.server.uploads[number]
        content += body
        total = (self.headers.get("Content-Range") or "*/*").rpartition("/")[2]
        if total == "*" or len(content) < int(total):
            self.answer(308, Range=f"bytes=0-{len(content) - 1}")
        else:
            self.answer(200, self.server.put(bucket, name, content))

    def batch(self, body: str) -> None:
        """Objects to be deleted, several in a request."""
        parts = []
        with self.server.lock:
            for bucket, name in re.findall(r"DELETE /storage/v1/b/([^/]+)/o/(\S+) HTTP", body):
                gone = self.server.buckets.get(bucket, {}).pop(unquote(name.partition("?")[0]), None)
                parts.append(f"--end\nContent-Type: application/http\n\nHTTP/1.1 {404 if gone is None else 204} \n\n")
        content = ("".join(parts) + "--end--").encode()
        self.answer(200, content, Content_Type="multipart/mixed; boundary=end")
