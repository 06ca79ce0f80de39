"""The words of ../README.md, spoken by the PyPI package `spiffe`; JWT-SVIDs are verified by PyJWT as well."""

import json
import os
import queue
import socket
import ssl
import sys
import tempfile

import jwt
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from spiffe import JwtSvid, SpiffeId, WorkloadApiClient, X509Source

DEADLINE_SECONDS = 120


def say(**fields):
    print(json.dumps(fields), flush=True)


def say_x509(svid):
    say(event="x509", id=str(svid.spiffe_id), serial=format(svid.leaf.serial_number, "x"))


def check(audience):
    with WorkloadApiClient() as client:
        context = client.fetch_x509_context()
        svid = context.default_svid
        bundle = context.x509_bundle_set.get_bundle_for_trust_domain(svid.spiffe_id.trust_domain)
        verify_chain(svid.cert_chain, bundle.x509_authorities)
        say_x509(svid)

        token = client.fetch_jwt_svid(audience={audience}).token
        keys = client.fetch_jwt_bundles().get_bundle_for_trust_domain(svid.spiffe_id.trust_domain)
        parsed = JwtSvid.parse_and_validate(token, keys, {audience})
        client.validate_jwt_svid(token, audience)
        header = jwt.get_unverified_header(token)
        claims = jwt.decode(
            token, keys.get_jwt_authority(header["kid"]), algorithms=[header["alg"]], audience=audience,
            options={"require": ["sub", "aud", "exp", "iat"]},
        )
        assert claims["sub"] == str(parsed.spiffe_id), (claims, parsed.spiffe_id)
        say(event="jwt", id=claims["sub"])


def verify_chain(chain, roots):
    """Each certificate is issued by the next, and the last by one of the roots."""
    for child, parent in zip(chain, chain[1:]):
        child.verify_directly_issued_by(parent)
    errors = []
    for root in roots:
        try:
            return chain[-1].verify_directly_issued_by(root)
        except Exception as err:  # pylint: disable=broad-except  (any of them means: not this root)
            errors.append(repr(err))
    raise ValueError(f"no root issued the chain: {errors}")


def tls_context(source, server_side):
    """A context for one connection: what the source holds now."""
    svid = source.get_x509_context().default_svid
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    bundle = source.get_bundle_for_trust_domain(svid.spiffe_id.trust_domain)
    context.load_verify_locations(cadata="".join(c.public_bytes(Encoding.PEM).decode() for c in bundle.x509_authorities))
    with tempfile.TemporaryDirectory() as folder:
        chain, key = os.path.join(folder, "chain.pem"), os.path.join(folder, "key.pem")
        svid.save(chain, key, Encoding.PEM)
        context.load_cert_chain(chain, key)
    return context


def peer_id(conn):
    leaf = x509.load_der_x509_certificate(conn.getpeercert(binary_form=True))
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    (uri,) = names.get_values_for_type(x509.UniformResourceIdentifier)
    return str(SpiffeId(uri))


def serve(expected):
    with X509Source() as source, socket.create_server(("127.0.0.1", 0)) as listener:
        say(event="listening", addr="%s:%d" % listener.getsockname())
        while True:
            raw, _ = listener.accept()
            raw.settimeout(10)
            try:
                with tls_context(source, True).wrap_socket(raw, server_side=True) as conn:
                    peer = peer_id(conn)
                    if peer != expected:
                        raise ValueError(f"peer is {peer}, not {expected}")
                    conn.makefile("r").readline()
                    conn.sendall(f"{source.get_x509_context().default_svid.spiffe_id}\n".encode())
                    say(event="accepted", peer=peer)
            except (OSError, ValueError) as err:
                say(event="refused", error=str(err))


def call(addr, expected):
    host, port = addr.rsplit(":", 1)
    with X509Source() as source, socket.create_connection((host, int(port)), timeout=10) as raw:
        with tls_context(source, False).wrap_socket(raw) as conn:
            peer = peer_id(conn)
            if peer != expected:
                raise ValueError(f"peer is {peer}, not {expected}")
            conn.sendall(b"hello\n")
            line = conn.makefile("r").readline()
            if not line:
                raise ValueError("the server closed without an answer")
            say(event="answered", peer=peer, line=line)


def watch(count):
    seen, updates = set(), queue.Queue(maxsize=100)
    with X509Source() as source:
        source.subscribe_for_updates(lambda: updates.put(None))
        while len(seen) < count:
            svid = source.get_x509_context().default_svid
            if svid.leaf.serial_number not in seen:
                seen.add(svid.leaf.serial_number)
                say_x509(svid)
                continue
            updates.get(timeout=DEADLINE_SECONDS)


def main(args):
    match args:
        case ["check", audience]:
            check(audience)
        case ["serve", expected]:
            serve(expected)
        case ["call", addr, expected]:
            call(addr, expected)
        case ["watch", count]:
            watch(int(count))
        case _:
            sys.exit("usage: check AUDIENCE | serve ID | call ADDR ID | watch N")


if __name__ == "__main__":
    main(sys.argv[1:])
