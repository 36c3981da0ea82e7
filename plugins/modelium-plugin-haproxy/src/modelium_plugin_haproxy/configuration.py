"""HAProxy's configuration: which requests go straight to a runtime, and what becomes of all others.

A request goes straight when the map has an entry for its model and what it asks for. The map's keys are
`http/NAME/VERB`, `grpc/NAME` and `openai/NAME`, its values the runtime's address; entries come and go by the admin
socket, so that the configuration itself only changes with the service's own addresses. Such a request is counted in the
stick table before it is sent, under its model's name. Keywords: https://docs.haproxy.org/2.8/configuration.html
"""

from __future__ import annotations

import ipaddress
import resource
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from modelium.api.datapath import AWAY, DataRoute, Front
from modelium_plugin_haproxy.admin import EXPIRE_S, ORGANISATIONS, TABLE
from modelium_plugin_haproxy.settings import HAProxySettings

VERBS = ("infer", "generate", "generate_stream")
"""What is asked of a model over KServe's HTTP that is use of it; all else the service answers."""

FIRST_MESSAGE_S = 600
"""How long a stream may be open before its first message."""

BUFFER_BYTES = 64 * 1024
"""An OpenAI request's model is found if the body fits; a longer one goes by the service."""

INVALID_ARGUMENT, UNAVAILABLE = 3, 14
"""https://grpc.io/docs/guides/status-codes/"""

RUNTIME_LOST = "the runtime took the request and did not answer; it was not sent again"
MODELIUM_LOST = "Modelium took the request and was ended before it could answer: ask again"
DOWN = f"{AWAY}; models that are loaded are served all the same"


@dataclass(frozen=True, slots=True)
class Files:
    """Where things lie."""

    folder: Path
    """Of the sockets: their paths may have 107 bytes at most (unix(7))."""
    state: Path

    @property
    def configuration(self) -> Path:
        return self.state / "haproxy.cfg"

    @property
    def map(self) -> Path:
        return self.state / "routes.map"

    @property
    def certificate(self) -> Path:
        """Beside it lies the key, by the same name with `.key` behind it."""
        return self.state / "tls.pem"

    @property
    def admin(self) -> Path:
        return self.folder / "haproxy.sock"


def entries(route: DataRoute) -> dict[str, str]:
    """The map's entries for a loaded model; none for what HAProxy can't reach or must not answer for."""
    found: dict[str, str] = {}
    http = _address(route.endpoints.get("kserve-http", ""))
    if http:
        # Triton refuses `infer` on such a model over HTTP; the service puts the responses together.
        verbs = [verb for verb in VERBS if not (route.decoupled and verb == "infer")]
        found |= {f"http/{route.model}/{verb}": http for verb in verbs}
    if grpc := _address(route.endpoints.get("kserve-grpc", "")):
        found[f"grpc/{route.model}"] = grpc
    if openai := _address(route.endpoints.get("openai", "")):
        found[f"openai/{route.model}"] = openai
    return found


def keys_of(model: str) -> tuple[str, ...]:
    """Of all entries that a model may have."""
    return (*(f"http/{model}/{verb}" for verb in VERBS), f"grpc/{model}", f"openai/{model}")


def _address(endpoint: str) -> str:
    """`IP:PORT`; empty for names, TLS, paths and IPv6, which go by the service."""
    url = urlsplit(endpoint if "://" in endpoint else f"//{endpoint}")
    if (
        url.scheme not in ("", "http", "grpc")
        or url.path.strip("/") not in ("", "v1")
        or not url.hostname
        or not url.port
    ):
        return ""
    host = "127.0.0.1" if url.hostname == "localhost" else url.hostname
    try:
        return f"{host}:{url.port}" if ipaddress.ip_address(host).version == 4 else ""
    except ValueError:
        return ""


def render(front: Front, settings: HAProxySettings, files: Files) -> str:
    """The whole file."""
    parts = (*_general(settings, files, front.access_log), *_http(front, files), *_grpc(front, files))
    return "\n".join((*parts, *_backends(front), ""))


def _general(settings: HAProxySettings, files: Files, access_log: bool) -> Iterable[str]:
    level, requests = ("info", "option httplog\n    log global") if access_log else ("notice", "option dontlognull")
    return f"""\
global
    nbthread {settings.threads}
    noreuseport
    maxconn {_connections(settings)}
    stats socket {files.admin} mode 600 level admin expose-fd listeners
    log stderr format timed daemon {level}
    tune.bufsize {BUFFER_BYTES}
    tune.h2.max-frame-size 65536
    tune.h2.initial-window-size 1048576
    tune.h2.max-concurrent-streams 1000
    hard-stop-after 60s

defaults
    mode http
    option http-keep-alive
    option http-no-delay
    {requests}
    option abortonclose
    option idle-close-on-response
    http-reuse always
    retries 0
    timeout connect 5s
    timeout http-keep-alive 3600s
    timeout client 3600s
    timeout server 3600s
    timeout client-fin 30s
    timeout tunnel 3600s

backend {TABLE}
    stick-table type string len 201 size 100k expire {EXPIRE_S}s store http_req_cnt,gpt0,gpc0,conn_cur

backend {ORGANISATIONS}
    stick-table type string len 300 size 100k expire {EXPIRE_S}s store http_req_cnt,gpc0,conn_cur
""".splitlines()


def _connections(settings: HAProxySettings) -> int:
    """Each takes two file descriptors, one to either side; HAProxy does not start where it may not have so many."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    return settings.max_connections if most < 0 else min(settings.max_connections, max(100, (most - 200) // 2))


def _http(front: Front, files: Files) -> Iterable[str]:
    yield "frontend http"
    yield f"    bind {_bind(front.host, front.port)}{_tls(front, files, 'h2,http/1.1')}"
    if front.sockets is not None:
        yield f"    bind unix@{front.sockets[0]} mode 660"
    yield from _named(front.access_log)
    # A page in a browser, a name that the service is not known by, long headers: the service judges.
    conditions = ["METH_POST", "!{ req.hdr(origin) -m found }", f"{{ req.hdrs,length lt {front.max_header_bytes} }}"]
    if front.hosts is not None:
        yield f"    acl known req.hdr(host),lower,regsub(:[0-9]+$,) {' '.join(front.hosts)}"
        conditions.append("known")
    if front.max_body_bytes is not None:  # what is too long, or may be, is the service's to refuse
        conditions.append(f"{{ req.hdr(content-length) -m int le {front.max_body_bytes} }}")
    direct = " ".join(conditions)
    stall = _ms(front.client_stall_s)
    yield f"    timeout http-request {stall}"
    yield f"    timeout client {stall}"
    # HAProxy says 400 where a body stops coming. Its words for what is no HTTP, or too slow with it, are its own.
    told = f"nothing came of the body for {front.client_stall_s:g} s, or the client closed its side too early"
    yield from _error(400, told, "x-stalled 1")
    yield "    http-after-response set-status 408 if { status 400 } { res.hdr(x-stalled) -m found }"
    yield "    http-after-response del-header x-stalled"
    yield from f"""\
    acl kserve path_reg ^/v2/models/[A-Za-z0-9][A-Za-z0-9._-]*(/versions/[0-9]+)?/(infer|generate|generate_stream)$
    acl openai path /v1/chat/completions /v1/completions /v1/embeddings
    http-request set-var(txn.model) path,field(4,/) if kserve {direct}
    http-request set-var(txn.verb) path,field(-1,/) if {{ var(txn.model) -m found }}
    http-request set-var(txn.key) str(http/),concat(,txn.model),concat(/,txn.verb) if {{ var(txn.model) -m found }}
    http-request wait-for-body time {stall} if openai {direct}
    http-request set-var(txn.model) req.body,json_query('$.model') if openai {direct}
    http-request set-var(txn.key) str(openai/),concat(,txn.model) if openai {{ var(txn.model) -m found }}
    http-request set-var(txn.to) var(txn.key),map_str({files.map}) if {{ var(txn.key) -m found }}
    acl direct var(txn.to) -m found
    # What curl calls any body, and Triton's HTTP server crashes on when it is long.
    acl form req.hdr(content-type) -i -m beg application/x-www-form-urlencoded
    acl binary req.hdr(inference-header-content-length) -m found
    http-request set-header content-type application/octet-stream if direct form binary
    http-request set-header content-type application/json if direct form
""".splitlines()
    yield from _carried("http")


def _grpc(front: Front, files: Files) -> Iterable[str]:
    yield "frontend grpc"
    yield f"    bind {_bind(front.host, front.grpc_port)}{_tls(front, files, 'h2') or ' proto h2'}"
    if front.sockets is not None:
        yield f"    bind unix@{front.sockets[1]} mode 660 proto h2"
    yield from _named(front.access_log)
    yield from _status(408, "no message came in time", INVALID_ARGUMENT)
    # Of a stream the first message alone is seen here.
    limited = front.max_body_bytes is not None
    stream = "" if limited else " /inference.GRPCInferenceService/ModelStreamInfer"
    fits = f" {{ req.body,bytes(1,4),be2dec(:,4) -m int le {front.max_body_bytes} }}" if limited else ""
    yield from f"""\
    acl unary path /inference.GRPCInferenceService/ModelInfer
    acl inference path /inference.GRPCInferenceService/ModelInfer{stream}
    http-request wait-for-body time {_ms(front.client_stall_s)} at-least 16 if unary
    http-request wait-for-body time {FIRST_MESSAGE_S}s at-least 16 if inference !unary
    # A message that is not compressed: five bytes of gRPC's own, then its fields, the model's name first.
    acl plain req.body,bytes(0,1),hex 00
    http-request set-var(txn.model) req.body,bytes(5),protobuf(1) if inference plain{fits}
    http-request set-var(txn.to) str(grpc/),concat(,txn.model),map_str({files.map}) if {{ var(txn.model) -m found }}
    acl direct var(txn.to) -m found
""".splitlines()
    yield from _carried("grpc")


def _carried(protocol: str) -> Iterable[str]:
    """Where a request goes, and on whose account when it goes straight to a runtime."""
    return f"""\
    http-request track-sc0 var(txn.model) table {TABLE} if direct
    acl named req.hdr(x-modelium-organisation) -m found
    http-request set-var(txn.organisation) req.hdr(x-modelium-organisation) if direct named
    http-request set-var(txn.who) var(txn.model),concat(|,txn.organisation) if direct named
    http-request track-sc1 var(txn.who) table {ORGANISATIONS} if direct named
    use_backend runtimes_{protocol} if direct
    default_backend service_{protocol}
""".splitlines()


def _named(access_log: bool) -> Iterable[str]:
    """An id for each request, told to the runtime and the client, and written to the access log."""
    yield "    http-request set-header x-request-id %[uuid()] unless { req.hdr(x-request-id),length gt 0 }"
    yield "    http-request set-var(txn.id) req.hdr(x-request-id)"
    yield "    http-after-response set-header x-request-id %[var(txn.id)]"
    if access_log:
        yield "    http-request capture req.hdr(x-request-id) len 64"


def _backends(front: Front) -> Iterable[str]:
    for protocol, h2, socket in (("http", "", front.service_http), ("grpc", " proto h2", front.service_grpc)):
        # The destination is the map's, so that no runtime has to be in the configuration.
        yield f"backend runtimes_{protocol}"
        yield "    http-request set-dst var(txn.to),field(1,:)"
        yield "    http-request set-dst-port var(txn.to),field(2,:)"
        # A runtime that refuses the connection was sent nothing: the service knows what to do with the request. Of one
        # that is lost with a request, HAProxy tells nothing where it had used the connection before: it closes the
        # client's, which may ask again, and no `retry-on` changes that (2.8).
        yield "    balance first"
        yield "    retries 1"
        yield "    option redispatch 1"
        # Half of what is idle goes each second: some runtimes close a connection after 5 s, and a request that meets
        # that is lost.
        yield f"    server any 0.0.0.0:0{h2} pool-purge-delay 1s"
        yield f"    server service unix@{socket}{h2}"
        told = _error if protocol == "http" else _status
        yield from told(502, RUNTIME_LOST)
        yield from told(503, DOWN)
        if protocol == "http":
            # llama.cpp closes a connection after a stream without saying so, and the next request would be lost with
            # it: once a model is known to be served by it (gpt0), its streams have connections of their own.
            yield "    http-response sc-set-gpt0(0) 1 if { res.hdr(server) -m str llama.cpp }"
            streams = "{ sc0_get_gpt0 gt 0 } { req.body,json_query('$.stream') -m bool }"
            yield f"    http-request set-header connection close if {streams}"
            yield from _mended(front)
            yield from _counted()
        yield ""
        yield f"backend service_{protocol}"
        yield f"    server service unix@{socket}{h2}"
        yield from told(502, MODELIUM_LOST)
        yield from told(503, DOWN)
        yield ""


def _mended(front: Front) -> Iterable[str]:
    """Whose fault an error is, told as the service itself would."""
    if front.client_errors or front.dead:
        stall = _ms(front.client_stall_s)
        yield f"    http-response wait-for-body time {stall} at-least 200 if {{ status 400 500 }}"
    if front.dead:
        yield f"    http-response set-status 502 if {{ status 400 500 }} {{ res.body -m reg {_quoted(front.dead)} }}"
    for begin in front.client_errors:
        yield f"    http-response set-status 400 if {{ status 500 }} {{ res.body -m beg {_quoted(begin)} }}"


def _counted() -> Iterable[str]:
    """Failures as they are told to the client: HAProxy's own count knows them before they are mended."""
    yield "    http-after-response sc-inc-gpc0(0) if { status ge 500 }"
    yield "    http-after-response sc-inc-gpc0(1) if { status ge 500 } { sc1_tracked }"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def _error(status: int, message: str, header: str = "Retry-After 1") -> Iterable[str]:
    body = f"""'{{"error":"{message}"}}'"""
    yield f"    http-error status {status} content-type application/json hdr {header} string {body}"


def _status(status: int, message: str, code: int = UNAVAILABLE) -> Iterable[str]:
    """As `_error`, by Trailers-Only: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md"""
    ours = f"if {{ status {status} }} {{ res.hdr(grpc-status) -m found }}"
    yield f"    http-error status {status} hdr grpc-status {code} hdr grpc-message '{message}'"
    yield f"    http-after-response set-header content-type application/grpc {ours}"
    yield f"    http-after-response set-status 200 {ours}"


def _tls(front: Front, files: Files, protocols: str) -> str:
    return f" ssl crt {files.certificate} alpn {protocols}" if front.certificate is not None else ""


def _ms(seconds: float) -> str:
    return f"{max(1, round(seconds * 1000))}ms"


def _bind(host: str, port: int) -> str:
    return f"{'*' if host in ('', '0.0.0.0') else host}:{port}"
