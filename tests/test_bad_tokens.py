"""Bad tokens over a real socket: 401 with a generic body, nothing echoed, nothing logged. And the good ones."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from gateway.testing.daemon import Daemon
from gateway.testing.rawclient import RawClient
from tests.tokens import b64, claims, data_claim, sign

NOW = int(time.time())
Make = Callable[[bytes], str]


def payload(**changes: Any) -> Make:
    return lambda secret: sign(secret, claims(**changes))


def header(**fields: Any) -> Make:
    return lambda secret: sign(secret, claims(), {"alg": "HS256", "typ": "JWT", **fields})


def raw_header(text: str) -> Make:
    return lambda secret: sign(secret, claims(), text.encode("utf-8", "surrogatepass"))


CASES: dict[str, Make] = {
    "empty": lambda _: "",
    "one part": lambda _: "abc",
    "four parts": lambda secret: sign(secret, claims()) + ".x",
    "no signature": lambda secret: sign(secret, claims()).rpartition(".")[0] + ".",
    "changed payload": lambda secret: ".".join(
        [
            (parts := sign(secret, claims()).split("."))[0],
            b64(json.dumps(claims(sub="bob")).encode()),
            parts[2],
        ]
    ),
    "other secret": lambda _: sign(b"x" * 48, claims()),
    "alg none": header(alg="none"),
    "alg None": header(alg="None"),
    "alg none, no signature": lambda _: (
        f"{b64(json.dumps({'alg': 'none'}).encode())}.{b64(json.dumps(claims()).encode())}."
    ),
    "alg HS512": header(alg="HS512"),
    "alg RS256": header(alg="RS256"),
    "alg list": header(alg=["HS256"]),
    "alg number": header(alg=256),
    "no alg": lambda secret: sign(secret, claims(), {"typ": "JWT"}),
    "alg repeated": raw_header('{"alg":"none","alg":"HS256"}'),
    "kid integer": header(kid=1),
    "kid null": raw_header('{"alg":"HS256","kid":null}'),
    "crit": header(crit=["exp"], exp=NOW + 600),
    "crit empty": header(crit=[]),
    "header deep": raw_header('{"alg":"HS256","x":' + "[" * 2900 + "]" * 2900 + "}"),
    "header 100k deep": raw_header("[" * 100_000),
    "header a list": raw_header('["HS256"]'),
    "alg lone surrogate": raw_header('{"alg":"HS256\\ud800"}'),
    "kid lone surrogate": raw_header('{"alg":"HS256","kid":"\\ud800"}'),
    "header no JSON": raw_header("alg: HS256"),
    "payload a list": lambda secret: sign(secret, b"[]"),
    "payload no JSON": lambda secret: sign(secret, b"\xff\xfe"),
    "expired": payload(iat=NOW - 100, exp=NOW - 20),
    "long expired": payload(exp=0),
    "nbf in the future": payload(nbf=NOW + 3600),
    "no iat": payload(iat=None),
    "iat in the future": payload(iat=NOW + 3600, exp=NOW + 7200),
    "no exp": payload(exp=None),
    "exp a string": payload(exp=str(NOW + 600)),
    "exp true": payload(exp=True),
    "exp infinite": lambda secret: sign(
        secret, json.dumps(claims(exp=0)).replace('"exp": 0', '"exp": Infinity').encode()
    ),
    "exp huge": lambda secret: sign(
        secret, json.dumps(claims(exp=0)).replace('"exp": 0', '"exp": 1' + "0" * 400).encode()
    ),
    "nbf a string": payload(nbf="0"),
    "wrong issuer": payload(iss="somebody"),
    "no issuer": payload(iss=None),
    "issuer a list": payload(iss=["api-gateway"]),
    "no sub": payload(sub=None),
    "empty sub": payload(sub="", data=data_claim("")),
    "sub a number": payload(sub=7),
    "sub with a control character": payload(sub="al\nice", data=data_claim("al\nice")),
    "sub with a surrogate": lambda secret: sign(
        secret, json.dumps(claims(sub="S")).replace('"S"', '"\\ud800"').encode()
    ),
    "sub too long": payload(sub="a" * 257, data=data_claim("a" * 257)),
    "no data": payload(data=None),
    "data no base64url": payload(data="!!!!"),
    "data a number": payload(data=5),
    "data no UserToken": payload(data=b64(b"\xff\xff\xff")),
    "data of somebody else": payload(data=data_claim("bob")),
    "data outlives exp": payload(data=data_claim(expires_at=NOW + 100_000)),
    "data expired": payload(data=data_claim(expires_at=NOW - 100)),
    "data with an unknown tier": payload(data=data_claim(subscription_tier=9)),
    "company with a control character": payload(data=data_claim(company_id="a\x00b")),
    "over 8 KiB": payload(padding="a" * 8200),
}
# Refused where the key has a name; a key without one is tried for any.
FOREIGN_KIDS: dict[str, Make] = {
    "kid unknown": header(kid="nobody"),
    "kid path": header(kid="../../../../dev/null"),
    "kid SQL": header(kid="x' UNION SELECT 'secret"),
    "kid empty": header(kid=""),
}
# A token this long does not fit into the request head and never reaches the check of tokens.
TOO_LARGE = {"header 100k deep", "over 8 KiB"}


@pytest.mark.parametrize("name", CASES)
def test_bad_token_gets_401_and_is_neither_echoed_nor_logged(daemon: Daemon, name: str) -> None:
    token = CASES[name](daemon.secret)
    with RawClient(daemon.url) as client:
        answer = client.request(client.headers(token))
        assert answer.status == (431 if name in TOO_LARGE else 401), answer
        if answer.status == 401:
            assert answer.code == "invalid_token"
            assert answer.headers["www-authenticate"] == 'Bearer error="invalid_token"'
    if len(token) > 40:
        assert token[:40] not in repr(answer)
        assert token[-30:] not in daemon.log()
    with RawClient(daemon.url) as client:
        client.upgrade(daemon.token())


def just_expired(secret: bytes) -> str:
    now = int(time.time())
    return payload(iat=now - 60, exp=now - 1, data=data_claim(expires_at=now - 1))(secret)


GOOD: dict[str, Make] = {
    "as minted": payload(),
    "padded data": payload(data=data_claim() + "=="[: -len(data_claim()) % 4]),
    "data with expires_at": payload(exp=NOW + 7200, data=data_claim(expires_at=NOW + 3600)),
    "expired within the leeway": just_expired,
    "float times": payload(exp=NOW + 3600.5),
    "aud that nobody asked for": payload(aud="elsewhere"),
    "header that points elsewhere": header(
        jku="https://evil.example/jwks", x5u="https://evil.example/c", jwk={"kty": "oct"}
    ),
    "unicode user": payload(sub="ålice", data=data_claim("ålice")),
}


@pytest.mark.parametrize("name", GOOD)
def test_good_token_is_admitted(daemon: Daemon, name: str) -> None:
    with RawClient(daemon.url) as client:
        client.upgrade(GOOD[name](daemon.secret))


def test_kid_of_nobody_is_refused_by_a_key_with_a_name_and_tried_on_one_without(
    daemon: Daemon, start_daemon: Callable[..., Daemon]
) -> None:
    named = start_daemon(settings={"auth.secret_kid": "2026-11"})
    for name, make in FOREIGN_KIDS.items():
        with RawClient(named.url) as client:
            assert client.request(client.headers(make(named.secret))).status == 401, name
        with RawClient(daemon.url) as client:
            client.upgrade(make(daemon.secret))
        with RawClient(daemon.url) as client:
            assert client.request(client.headers(make(b"x" * 48))).status == 401, name
    with RawClient(named.url) as client:
        client.upgrade(header(kid="2026-11")(named.secret))


def test_all_three_places_of_the_token(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(settings={"auth.allow_query_token": True})
    token = daemon.token()
    with RawClient(daemon.url) as client:
        assert "sec-websocket-protocol" not in client.upgrade(token).headers
    with RawClient(daemon.url) as client:
        answer = client.request(client.headers(Sec_WebSocket_Protocol=f"bearer, {token}"))
        assert (answer.status, answer.headers["sec-websocket-protocol"]) == (101, "bearer")
    with RawClient(daemon.url) as client:
        answer = client.request(client.headers(Sec_WebSocket_Protocol=f"gateway.v1.json, bearer, {token}"))
        assert (answer.status, answer.headers["sec-websocket-protocol"]) == (101, "gateway.v1.json")
        assert client.read_control()["type"] == "welcome"
    with RawClient(daemon.url) as client:
        assert client.request(client.headers(), target=f"/ws/mt5?access_token={token}").status == 101
    assert token not in daemon.log()


def test_query_token_is_refused_unless_allowed(daemon: Daemon) -> None:
    with RawClient(daemon.url) as client:
        assert client.request(client.headers(), target=f"/ws/mt5?access_token={daemon.token()}").status == 401


def test_repeated_or_other_authorization_is_refused(daemon: Daemon) -> None:
    token = daemon.token()
    for values in ([f"Bearer {token}"] * 2, [f"Basic {token}"], [token], ["Bearer"]):
        with RawClient(daemon.url) as client:
            headers = client.headers() + [("Authorization", value) for value in values]
            assert client.request(headers).status == 401


def test_audience_and_issuer_are_checked_where_configured(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(settings={"auth.audience": "ticks", "auth.issuer": "desk"})
    for changes, status in (
        ({"aud": "ticks", "iss": "desk"}, 101),
        ({"aud": ["other", "ticks"], "iss": "desk"}, 101),
        ({"aud": "other", "iss": "desk"}, 401),
        ({"iss": "desk"}, 401),
        ({"aud": "ticks"}, 401),
    ):
        with RawClient(daemon.url) as client:
            assert client.request(client.headers(sign(daemon.secret, claims(**changes)))).status == status, changes


KEYS: dict[str, Callable[[], Any]] = {
    "RS256": lambda: rsa.generate_private_key(65537, 2048),
    "ES256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate,
}


@pytest.mark.parametrize("algorithm", KEYS)
def test_asymmetric_keys_from_pem_and_jwks(start_daemon: Callable[..., Daemon], tmp_path: Path, algorithm: str) -> None:
    by_pem, by_jwks = KEYS[algorithm](), KEYS[algorithm]()
    pem = by_pem.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "key.pem").write_bytes(pem)
    to_jwk = jwt.get_algorithm_by_name(algorithm).to_jwk(by_jwks.public_key(), as_dict=True)
    (tmp_path / "jwks.json").write_text(json.dumps({"keys": [{**to_jwk, "kid": "second", "use": "sig"}]}))
    daemon = start_daemon(
        settings={
            "auth.algorithms": ["HS256", algorithm],
            "auth.public_keys": [{"file": str(tmp_path / "key.pem"), "kid": "first"}],
            "auth.jwks_file": str(tmp_path / "jwks.json"),
        }
    )

    def status(token: str) -> int:
        with RawClient(daemon.url) as client:
            return client.request(client.headers(token)).status

    assert status(jwt.encode(claims(), by_pem, algorithm, {"kid": "first"})) == 101
    assert status(jwt.encode(claims(), by_jwks, algorithm, {"kid": "second"})) == 101
    assert status(jwt.encode(claims(), by_jwks, algorithm)) == 101
    assert status(jwt.encode(claims(), by_jwks, algorithm, {"kid": "first"})) == 401
    assert status(jwt.encode(claims(), KEYS[algorithm](), algorithm)) == 401
    assert status(sign(pem, claims())) == 401, "signed with the public key as an HS256 secret"
    assert status(sign(daemon.secret, claims())) == 101


def test_private_key_signs_with_the_token_command(tmp_path: Path, start_daemon: Callable[..., Daemon]) -> None:
    import subprocess
    import sys

    key = ed25519.Ed25519PrivateKey.generate()
    (tmp_path / "private.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    (tmp_path / "public.pem").write_bytes(
        key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    daemon = start_daemon(
        settings={
            "auth.algorithms": ["EdDSA", "HS256"],
            "auth.public_keys": [{"file": str(tmp_path / "public.pem")}],
        }
    )
    command = [sys.executable, "-m", "gateway", "token", "--user", "alice", "--company", "acme"]
    token = subprocess.run(
        [*command, "--private-key", str(tmp_path / "private.pem"), "--algorithm", "EdDSA"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    with RawClient(daemon.url) as client:
        client.upgrade(token)
