"""The door of a federation on one machine: each of its ports asks for the certificate that was made for it.

Flower's open distribution asks nobody who they are: whoever reaches the SuperLink's port may list, start and stop runs,
and a run's code runs as the SuperLink's owner. On loopback that is everybody with an account on the machine. Flower's
ports can speak TLS, but Flower has no option by which they demand a certificate of the *client*. The HTTP server and
the HTTP client that it uses (uvicorn, httpx) have one. So ``python -m dpteach.flower.door COMMAND …`` starts one of
Flower's commands with both set, from the folder that :data:`VARIABLE` names; and since Flower may change,
:func:`answers_strangers` looks from outside.
"""

import contextlib
import datetime
import functools
import ipaddress
import os
import shlex
import socket
import ssl
import sys
from importlib import metadata
from pathlib import Path

VARIABLE = "DPTEACH_DOOR"  # the folder with the certificate and its key, for the owner's eyes only
CERTIFICATE, KEY, COMMANDS = "door.crt", "door.key", "bin"  # in that folder; COMMANDS: Flower's, each through this door


def make(folder: Path) -> None:
    """Make, in its owner's own folder: a certificate for 127.0.0.1, its key, and Flower's commands behind it.

    Server and clients have the same certificate and trust no other. A command that Flower starts by its name is found
    here first, if ``PATH`` says so.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a federation on this machine")])
    now, day = datetime.datetime.now(datetime.timezone.utc), datetime.timedelta(days=1)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - day)
        .not_valid_after(now + 365 * day)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    (folder / CERTIFICATE).write_bytes(made.public_bytes(Encoding.PEM))
    _private(folder / KEY, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    (folder / COMMANDS).mkdir()
    for entry in metadata.distribution("flwr").entry_points.select(group="console_scripts"):
        script = folder / COMMANDS / entry.name
        script.write_text(
            f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m dpteach.flower.door {entry.name} "$@"\n', encoding="utf8"
        )
        script.chmod(0o700)


def make_node_key(file: Path) -> Path:
    """Write a SuperNode's private key into ``file``; returns the file with the public one, to register it."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

    key = ec.generate_private_key(ec.SECP384R1())
    _private(file, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    public = file.with_suffix(".pub")
    public.write_bytes(key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    return public


def _private(file: Path, content: bytes) -> None:
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as opened:
        opened.write(content)


def close(folder: Path) -> None:
    """From now on, in this process: a server demands the folder's certificate, and a client shows it."""
    import httpx
    import uvicorn

    crt, key = str(folder / CERTIFICATE), str(folder / KEY)
    serve, ask = uvicorn.Config.__init__, httpx.Client.__init__

    @functools.wraps(serve)
    def demand(self, *args, **kwargs):
        serve(
            self,
            *args,
            **{
                **kwargs,
                "ssl_certfile": crt,
                "ssl_keyfile": key,
                "ssl_ca_certs": crt,
                "ssl_cert_reqs": ssl.CERT_REQUIRED,
            },
        )

    @functools.wraps(ask)
    def show(self, *, verify=True, **kwargs):
        context = verify if isinstance(verify, ssl.SSLContext) else httpx.create_ssl_context(verify=verify)
        context.load_cert_chain(crt, key)
        ask(self, verify=context, **kwargs)

    uvicorn.Config.__init__, httpx.Client.__init__ = demand, show


def answers_strangers(port: int) -> bool:
    """Whether a port of this machine says anything, with TLS or without, to somebody who has no certificate.

    The alert that ends a TLS connection is no answer. Silence counts as one: it may be waiting for more.
    """

    def asked(connection: socket.socket) -> bytes:
        connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        return connection.recv(1)

    def connected():
        return socket.create_connection(("127.0.0.1", port), timeout=5)

    try:
        with contextlib.suppress(ssl.SSLError, ConnectionError), connected() as plain:
            if asked(plain) not in (b"", b"\x15"):  # 21: a TLS alert
                return True
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with (
            contextlib.suppress(ssl.SSLError, ConnectionError),
            connected() as plain,
            context.wrap_socket(plain) as secure,
        ):
            return asked(secure) != b""
    except TimeoutError:
        return True
    return False


if __name__ == "__main__":
    command = sys.argv.pop(1)
    sys.argv[0] = command
    close(Path(os.environ[VARIABLE]))
    (entry,) = metadata.distribution("flwr").entry_points.select(group="console_scripts", name=command)
    sys.exit(entry.load()())
