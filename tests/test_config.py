"""Settings: every fault at once, each with its path; file under environment under flags."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from gateway import config
from gateway.errors import ConfigError

SECRET = "s" * 40


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    return tmp_path / "gateway.toml"


def faults_of(path: Path | None, flags: dict[str, object] | None = None) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as error:
        config.load(path, flags)
    return error.value.faults


def test_every_fault_is_reported_at_once_with_its_path(toml: Path) -> None:
    toml.write_text(
        """
        nonsense = 1
        [listen]
        port = 70000
        pathh = "/x"
        [routes]
        topics = { tick_data = "no topic!" }
        [kafka]
        properties = { acks = "0" }
        [session]
        ping_interval_s = 50
        """
    )
    faults = faults_of(toml)
    for start in (
        "auth: is missing",
        "kafka: properties may not set acks",
        "listen.pathh: is not a setting",
        "listen.port: ",
        "nonsense: is not a setting",
        "routes.topics.tick_data: 'no topic!' is not a Kafka topic name",
        "session: idle_timeout_s must be longer",
    ):
        assert any(fault.startswith(start) for fault in faults), (start, faults)
    assert len(faults) == 7


def test_flags_win_over_environment_wins_over_file(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toml.write_text(f'[auth]\nsecret = "{SECRET}"\n[listen]\nport = 1\nhost = "file"\nbacklog = 7\n')
    monkeypatch.setenv("GATEWAY_LISTEN__PORT", "2")
    monkeypatch.setenv("GATEWAY_LISTEN__HOST", "environment")
    monkeypatch.setenv("GATEWAY_KAFKA__PROPERTIES", '{"linger.ms": 9}')
    settings = config.load(toml, {"listen.port": 3})
    assert (settings.listen.port, settings.listen.host, settings.listen.backlog) == (3, "environment", 7)
    assert settings.kafka.properties == {"linger.ms": 9}


@pytest.mark.parametrize("name", ["GATEWAY_LISTEM__PORT", "GATEWAY_LISTEN__PROT", "GATEWAY_PORT__LISTEN"])
def test_unknown_environment_names_are_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("GATEWAY_AUTH__SECRET", SECRET)
    monkeypatch.setenv(name, "1")
    assert f"{name}: is not a setting (environment)" in faults_of(None)


def test_missing_and_broken_files_are_named(toml: Path) -> None:
    assert faults_of(toml) == (f"{toml}: No such file or directory",)
    toml.write_text("[listen\n")
    assert str(toml) in faults_of(toml)[0]
    assert "line 1" in faults_of(toml)[0]


def test_no_fault_quotes_a_secret(toml: Path) -> None:
    toml.write_text('[auth]\nsecret = ["very-secret-value"]\nsecret_file = 7\n')
    assert "very-secret-value" not in " ".join(faults_of(toml))
    toml.write_text(f'[auth]\nsecret = "{SECRET}"\n')
    assert SECRET not in repr(config.load(toml))
    assert SECRET not in config.load(toml).model_dump_json()


def test_relative_files_are_beside_the_settings_and_credentials_where_systemd_puts_them(
    toml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toml.write_text('[auth]\nsecret_file = "credential:jwt"\n[tls]\ncert_file = "c.pem"\nkey_file = "/etc/k.pem"\n')
    assert "CREDENTIALS_DIRECTORY is not set" in faults_of(toml)[0]
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", "/run/credentials/gateway")
    settings = config.load(toml)
    assert settings.auth.secret_file == "/run/credentials/gateway/jwt"
    assert settings.tls.cert_file == str(toml.parent / "c.pem")
    assert settings.tls.key_file == "/etc/k.pem"


def test_kafka_secrets_come_from_files(toml: Path) -> None:
    (toml.parent / "password").write_text("hush\n")
    toml.write_text(f'[auth]\nsecret = "{SECRET}"\n[kafka]\nproperty_files = {{ "sasl.password" = "password" }}\n')
    settings = config.load(toml)
    assert config.kafka_properties(settings.kafka)["sasl.password"] == "hush"
    (toml.parent / "password").unlink()
    with pytest.raises(ConfigError, match=r"kafka\.property_files\.sasl\.password: .*password: No such file"):
        config.kafka_properties(settings.kafka)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('[tls]\ncert_file = "c.pem"', "tls: cert_file and key_file belong together"),
        ("[listen]\nmax_message_bytes = 8000000", "does not fit into Kafka's message.max.bytes"),
        ("[kafka]\nmax_queued_bytes = 100000", "holds fewer than four messages"),
        ("[listen]\nhandshake_timeout_s = 0", "listen.handshake_timeout_s: Input should be greater than 0"),
        ("[listen]\nhandshake_timeout_s = nan", "listen.handshake_timeout_s: "),
        ("[routes]\ntopics = {}", "routes.topics: "),
    ],
)
def test_settings_that_do_not_fit_together(toml: Path, text: str, fault: str) -> None:
    toml.write_text(f'[auth]\nsecret = "{SECRET}"\n{text}\n')
    assert any(fault in line for line in faults_of(toml)), faults_of(toml)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "no key: give secret_file, public_keys or jwks_file"),
        (f'secret = "{SECRET}"\nsecret_file = "x"', "not both"),
        ('algorithms = []\nsecret_file = "x"', "at least one"),
        ('algorithms = ["none"]\nsecret_file = "x"', "auth.algorithms.0"),
        ('algorithms = ["RS256"]\nsecret_file = "x"', "a secret is for HS256"),
    ],
)
def test_keys_that_do_not_fit_together(toml: Path, text: str, fault: str) -> None:
    toml.write_text(f"[auth]\n{text}\n")
    assert any(fault in line for line in faults_of(toml)), faults_of(toml)


def test_a_cap_over_the_open_file_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    raised: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: raised.append(limits))
    config.check_descriptors(1000)
    assert raised == [(1512, 4096)]
    with pytest.raises(ConfigError, match=r"listen.max_connections: 4000 needs 4512 open files, the limit is 4096"):
        config.check_descriptors(4000)


def test_faults_of_limits_are_named_and_a_redis_url_is_never_quoted(toml: Path) -> None:
    toml.write_text(
        f"""
        [auth]
        secret = "{SECRET}"
        not_before = 2026-11-01T00:00:00
        [tiers.free]
        users = -1
        [tiers.gold]
        users = 1
        [breaker]
        share = 2
        exempt_addresses = ["10.0.0.0/8", "balancer"]
        [registry]
        redis_url = "http://user:hush@redis"
        """
    )
    faults = faults_of(toml)
    for start in (
        "auth.not_before: ",
        "tiers.free.users: ",
        "tiers.gold: is not a setting",
        "breaker.share: ",
        "breaker.exempt_addresses.1: 'balancer'",
        "registry.redis_url: wanted redis://",
    ):
        assert any(fault.startswith(start) for fault in faults), (start, faults)
    assert len(faults) == 6
    assert "hush" not in str(faults)


def test_tiers_have_their_own_defaults_and_each_setting_its_name_in_the_environment(
    toml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toml.write_text(f'[auth]\nsecret = "{SECRET}"\n[tiers.pro]\npairs = 7\n')
    monkeypatch.setenv("GATEWAY_TIERS__FREE__USERS", "9")
    limits = config.load(toml).tiers.limits
    assert {tier: (one.messages_per_second, one.users, one.accounts, one.pairs) for tier, one in limits.items()} == {
        "free": (50, 9, 5, 0),
        "pro": (75, 5, 20, 7),
        "enterprise": (100, 10, 50, 0),
    }
