"""The command line as an operator meets it: one readable line for every fault, exit status 1, no traceback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gateway.client.ticks import COLUMNS
from gateway.testing import devkeys
from tests.test_journey import ROWS


def gateway(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gateway", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, **(environment or {})},
    )


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_text("s" * 40)
    path = tmp_path / "gateway.toml"
    path.write_text('[auth]\nsecret_file = "secret"\n[listen]\nport = 0\n[sidecar]\nport = 0\n')
    return path


def check_fault(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 1, done
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("gateway: ")]
    assert lines, done.stderr
    for word in words:
        assert word in " ".join(lines), (word, lines)


def test_check_config_shows_the_settings_without_secrets(toml: Path) -> None:
    toml.write_text(
        toml.read_text() + '[kafka]\nproperties = { "sasl.username" = "u", "sasl.password" = "hush-hush" }\n'
    )
    done = gateway("check-config", str(toml))
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"{toml}: ok\n")
    assert '"port": 0' in done.stdout
    assert "hush-hush" not in done.stdout


@pytest.mark.parametrize("command", ["check-config", "serve"])
def test_bad_files_are_named_with_their_setting(toml: Path, tmp_path: Path, command: str) -> None:
    arguments = [command, *([] if command == "check-config" else ["--config"]), str(toml)]
    good = toml.read_text()

    check_fault(gateway(command, *arguments[1:-1], "/no/such.toml"), "/no/such.toml", "No such file")
    toml.write_text(good.replace('"secret"', '"missing"'))
    check_fault(gateway(*arguments), "auth.secret_file", "missing", "No such file")
    (tmp_path / "short").write_text("short")
    toml.write_text(good.replace('"secret"', '"short"'))
    check_fault(gateway(*arguments), "auth.secret_file", "at least 32 bytes")

    _, certificate, _ = devkeys.write_certificate(tmp_path, "a.example")
    (tmp_path / "other").mkdir()
    _, _, other_key = devkeys.write_certificate(tmp_path / "other", "b.example")
    toml.write_text(f'{good}[tls]\ncert_file = "{certificate}"\nkey_file = "{other_key}"\n')
    check_fault(gateway(*arguments), "tls:", str(certificate), str(other_key), "KEY_VALUES_MISMATCH")
    toml.write_text(f'{good}[tls]\ncert_file = "{certificate}"\nkey_file = "/no/key"\n')
    check_fault(gateway(*arguments), "tls.key_file", "/no/key", "No such file")

    (tmp_path / "public.pem").write_text("nonsense")
    toml.write_text('[auth]\nalgorithms = ["RS256"]\npublic_keys = [{ file = "public.pem" }]\n')
    check_fault(gateway(*arguments), "auth.public_keys.0.file", "not a PEM public key")
    (tmp_path / "jwks.json").write_text('{"keys": 5}')
    toml.write_text('[auth]\nalgorithms = ["RS256"]\njwks_file = "jwks.json"\n')
    check_fault(gateway(*arguments), "auth.jwks_file", "not a JWKS")
    toml.write_text(good + '[kafka]\nproperties = { "linger.mss" = 1 }\n')
    check_fault(gateway(*arguments), "kafka.properties", "linger.mss")
    toml.write_text(good.replace("port = 0", "port = 0\nmax_connections = 900000", 1))
    check_fault(gateway(*arguments), "listen.max_connections", "open files")


def test_port_in_use_is_one_line(toml: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        check_fault(
            gateway("serve", "--config", str(toml), "--port", port),
            f"127.0.0.1:{port}",
            "Address already in use",
        )
        check_fault(
            gateway("serve", "--config", str(toml), "--sidecar-port", port),
            "sidecar",
            port,
            "Address already in use",
        )
    check_fault(gateway("serve", "--config", str(toml), "--host", "no.such.host.invalid"), "no.such.host.invalid")


def test_flags_and_sets_are_checked_like_the_file(toml: Path) -> None:
    check_fault(gateway("check-config", str(toml), "--set", "listen.prot=1"), "listen.prot", "is not a setting")
    check_fault(gateway("check-config", str(toml), "--set", "nonsense"), "SECTION.KEY=VALUE")
    done = gateway("check-config", str(toml), "--set", "listen.max_connections=77")
    assert '"max_connections": 77' in done.stdout


def test_serve_without_any_key_says_what_is_missing() -> None:
    check_fault(gateway("serve"), "auth: is missing")


def test_token_of_the_development_secret_is_stable_and_private(tmp_path: Path) -> None:
    state = {"XDG_STATE_HOME": str(tmp_path)}
    first = gateway("token", "--user", "alice", "--company", "acme", environment=state)
    assert first.returncode == 0
    assert first.stdout.count(".") == 2
    secret = tmp_path / "gateway" / "dev-secret"
    assert secret.stat().st_mode & 0o777 == 0o600
    before = secret.read_text()
    gateway("token", "--user", "bob", environment=state)
    assert secret.read_text() == before
    assert before not in first.stdout + first.stderr
    check_fault(gateway("token", "--user", "a", "--algorithm", "RS256", environment=state), "belong together")
    check_fault(
        gateway("token", "--user", "a", "--algorithm", "RS256", "--private-key", "/no/key", environment=state),
        "/no/key",
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["No such file"]),
        ("a,b\n", ["line 1", "wanted the columns"]),
        ("", ["line 1"]),
        (f"{','.join(COLUMNS)}\n1,EURUSD,1.1,1.2\n", ["line 2", "4 columns"]),
        (f"{','.join(COLUMNS)}\n{ROWS[0]}\n1,EURUSD,x,1.2,0\n", ["line 3", "bid"]),
        (f"{','.join(COLUMNS)}\n1,EURUSD,1.1,1.2,-5\n", ["line 2", "volume"]),
    ],
)
def test_bad_tick_files_are_named_with_the_line(tmp_path: Path, text: str | None, words: list[str]) -> None:
    path = tmp_path / "ticks.csv"
    if text is not None:
        path.write_text(text)
    check_fault(gateway("stream", str(path), "--url", "ws://127.0.0.1:1/", "--token", "t"), str(path), *words)


def test_stream_needs_a_token_and_a_readable_ca(tmp_path: Path) -> None:
    path = tmp_path / "ticks.csv"
    path.write_text("\n".join([",".join(COLUMNS), *ROWS]))
    check_fault(gateway("stream", str(path), "--url", "ws://127.0.0.1:1/"), "a token is needed")
    check_fault(
        gateway("stream", str(path), "--url", "wss://127.0.0.1:1/", "--token", "t", "--ca", "/no/ca"),
        "--ca /no/ca",
    )


def test_usage_errors_exit_with_a_message() -> None:
    done = gateway("serve", "--no-such-flag")
    assert done.returncode != 0
    assert "--no-such-flag" in done.stdout + done.stderr
    assert gateway("--version").stdout.strip() == "0.1.0"
    for command in ("serve", "check-config", "token", "stream", "demo"):
        assert gateway(command, "--help").returncode == 0


def test_demo_accounts_for_every_message(tmp_path: Path) -> None:
    path = tmp_path / "ticks.csv"
    path.write_text("\n".join([",".join(COLUMNS), *ROWS]))
    done = gateway("demo", "--clients", "5", "--rate", "20", "--seconds", "2", "--ticks", str(path))
    assert done.returncode == 0, done
    last = done.stdout.splitlines()[-1]
    assert last == "sent 200, received back from Kafka 200, lost 0, doubled 0, out of order 0"
    assert "messages/s" in done.stdout


def test_the_example_of_every_setting_is_valid(tmp_path: Path) -> None:
    _, certificate, key = devkeys.write_certificate(tmp_path, "gateway.example")
    (tmp_path / "tls-key").write_bytes(key.read_bytes())
    (tmp_path / "jwt-secret").write_text("s" * 48)
    example = Path(__file__).parent.parent / "deploy" / "gateway.toml"
    done = gateway(
        "check-config",
        str(example),
        "--set",
        f"tls.cert_file={certificate}",
        environment={"CREDENTIALS_DIRECTORY": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(": ok\n")
