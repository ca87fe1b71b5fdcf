"""What an operator may set, and the sentence that each mistake gets."""

import os
import re
from datetime import timedelta
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.errors import StartRefusedError
from backend.models.access.sources import LimitKind
from backend.models.setting_values import LogLevel, ReloadMode
from backend.settings import Settings, load_settings, trusted_env_file, unknown_settings

KEY = "vXs/2igcEtnCFS8dJ1SSp1Gi6AHrqL0h4uvGXghFwS8="
EXAMPLE = Path(__file__).parent.parent / ".env.example"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither this shell's variables nor the checkout's `.env` reach a test."""
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.chdir(tmp_path)


def refusal() -> str:
    with pytest.raises(StartRefusedError) as caught:
        load_settings()
    # What a traceback would show counts as shown.
    assert caught.value.__suppress_context__
    return str(caught.value)


def test_nothing_set_gives_the_documented_defaults(tmp_path: Path) -> None:
    settings = load_settings()
    assert settings.wireguard_ip_pool == IPv4Network("10.0.0.0/24")
    assert settings.wireguard_hub_public_key is None
    assert settings.wireguard_hub_endpoint == "localhost:51820"
    assert settings.wireguard_hub_ip == IPv4Address("10.0.0.1")
    assert settings.wireguard_config_path == Path("/etc/wireguard/wg0.conf")
    assert settings.wireguard_reload is ReloadMode.SYNCCONF
    assert settings.state_directory == tmp_path / "var"
    assert settings.database_url == f"sqlite:///{tmp_path}/var/provisioning.sqlite"
    assert settings.enable_dbos is True
    assert settings.log_level is LogLevel.INFO
    assert settings.access_log is False
    assert settings.wireguard_rate_limit_storage == "memory://"
    assert settings.rate_limits == {
        LimitKind.SOURCE: "60000/minute",
        LimitKind.TOKEN: "60000/minute",
        LimitKind.KEY: "60000/minute",
        LimitKind.FAILED_AUTHENTICATION: "30/minute",
    }
    assert settings.audit_keep == timedelta(days=365)
    assert settings.backup_directory == tmp_path / "var" / "backups"
    assert (settings.wireguard_backup_keep, settings.wireguard_backup_keep_days) == (14, 30)
    assert (settings.interface, settings.listen_port) == ("wg0", 51820)


def test_the_example_file_is_the_defaults(tmp_path: Path) -> None:
    plain = load_settings()
    (tmp_path / ".env").write_text(EXAMPLE.read_text())
    assert load_settings() == plain


def test_the_example_file_names_every_setting() -> None:
    text = EXAMPLE.read_text()
    assert [name for name in Settings.model_fields if f"{name.upper()}=" not in text] == []


def test_an_env_file_is_read_and_the_environment_wins(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".env").write_text("WIREGUARD_HUB_ENDPOINT=file:1\nWIREGUARD_RELOAD=off\nSOMETHING_ELSE=1\n")
    monkeypatch.setenv("WIREGUARD_HUB_ENDPOINT", "environment:2")
    settings = load_settings()
    assert settings.wireguard_hub_endpoint == "environment:2"
    assert settings.wireguard_reload is ReloadMode.OFF


def test_an_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = load_settings()
    for name in Settings.model_fields:
        monkeypatch.setenv(name.upper(), "")
    assert load_settings() == plain


def test_misspelt_settings_are_reported_with_the_closest_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in unknown_settings():
        monkeypatch.delenv(name)
    monkeypatch.setenv("WIREGUARD_IPPOOL", "10.8.0.0/24")
    monkeypatch.setenv("wireguard_hubip", "10.8.0.1")
    monkeypatch.setenv("WIREGUARD_RELOAD", "off")
    monkeypatch.setenv("WIRE", "1")
    (tmp_path / ".env").write_text(
        "WIREGUARD_CONFIG=a\nexport WIREGUARD_XYZ='b'\nwireguard_hub_ip=10.0.0.1\nOTHER=$HOME\n"
        "# WIREGUARD_C=1\n"
    )
    assert unknown_settings() == {
        "WIREGUARD_CONFIG": "WIREGUARD_CONFIG_PATH",
        "WIREGUARD_HUBIP": "WIREGUARD_HUB_IP",
        "WIREGUARD_IPPOOL": "WIREGUARD_IP_POOL",
        "WIREGUARD_XYZ": None,
    }


def test_env_file_that_is_not_text_holds_no_names(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"WIREGUARD_IPPOOL=\xff\n")
    assert "WIREGUARD_IPPOOL" not in unknown_settings()


def test_settings_do_not_change() -> None:
    settings: Any = load_settings()
    with pytest.raises(ValueError, match="frozen"):
        settings.enable_dbos = False


@pytest.mark.parametrize(
    "endpoint",
    [
        "hub.example.com:51820",
        "hub.example.com.:1",
        "a_b-c:65535",
        "192.0.2.1:51820",
        "[2001:db8::1]:51820",
        "3com.example:9",
    ],
)
def test_endpoints_that_peers_can_reach_are_taken(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setenv("WIREGUARD_HUB_ENDPOINT", endpoint)
    settings = load_settings()
    assert settings.wireguard_hub_endpoint == endpoint
    assert settings.listen_port == int(endpoint.rpartition(":")[2])


def test_backups_may_be_elsewhere_or_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WIREGUARD_BACKUP_DIRECTORY", "elsewhere")
    monkeypatch.setenv("WIREGUARD_BACKUP_KEEP", "0")
    settings = load_settings()
    assert (settings.backup_directory, settings.wireguard_backup_keep) == (tmp_path / "elsewhere", 0)


WRONG = [
    ("WIREGUARD_BACKUP_KEEP", "-1", "is not a number from 0 to 99999; write one like 14."),
    ("WIREGUARD_BACKUP_KEEP", "00", "is not a number from 0 to 99999; write one like 14."),
    ("WIREGUARD_BACKUP_KEEP_DAYS", "0", "is no number of days from 1 to 99999; write one like 365."),
    ("WIREGUARD_IP_POOL", "ten", "is not an IPv4 network in CIDR notation; write one like 10.0.0.0/24."),
    (
        "WIREGUARD_IP_POOL",
        "fd00::/64",
        "is not an IPv4 network in CIDR notation; write one like 10.0.0.0/24.",
    ),
    ("WIREGUARD_IP_POOL", "10.0.0.5/24", "has host bits set; write 10.0.0.0/24."),
    ("WIREGUARD_IP_POOL", "10.0.0.0/31", "is a /31; choose a prefix length from /30 (2 addresses) to /8."),
    ("WIREGUARD_IP_POOL", "10.0.0.0", "is a /32; choose a prefix length from /30 (2 addresses) to /8."),
    ("WIREGUARD_IP_POOL", "8.0.0.0/7", "is a /7; choose a prefix length from /30 (2 addresses) to /8."),
    (
        "WIREGUARD_HUB_PUBLIC_KEY",
        "jKlMnOpQrStUvWxYzAbCdEfGhIjKlMnO=",
        (
            "is not a usable key (a WireGuard key is 44 characters of base64, this is 33); "
            "leave it empty to take the config's own."
        ),
    ),
    (
        "WIREGUARD_HUB_IP",
        "10.0.1.1",
        "(10.0.1.1) is outside of WIREGUARD_IP_POOL (10.0.0.0/24); set it to 10.0.0.1.",
    ),
    (
        "WIREGUARD_HUB_IP",
        "10.0.0.0",
        "(10.0.0.0) is the network address of 10.0.0.0/24; set it to 10.0.0.1.",
    ),
    (
        "WIREGUARD_HUB_IP",
        "10.0.0.255",
        "(10.0.0.255) is the broadcast address of 10.0.0.0/24; set it to 10.0.0.1.",
    ),
    (
        "WIREGUARD_HUB_IP",
        "10.0.0.1/24",
        "is not an IPv4 address; write one like 10.0.0.1, without a prefix length.",
    ),
    ("WIREGUARD_RELOAD", "restart", "is neither syncconf nor off; write one of the two."),
    ("ENABLE_DBOS", "perhaps", "is neither true nor false; write one of the two."),
    (
        "WIREGUARD_RATE_LIMIT_SOURCE",
        "many",
        "is not one rate limit; write one like 30/minute or 1000 per 2 hours.",
    ),
    (
        "WIREGUARD_RATE_LIMIT_TOKEN",
        "1/second; 30/minute",
        "is not one rate limit; write one like 30/minute or 1000 per 2 hours.",
    ),
    ("WIREGUARD_RATE_LIMIT_KEY", "0/minute", "allows nothing at all; write one like 30/minute."),
    (
        "WIREGUARD_RATE_LIMIT_FAILED_AUTHENTICATION",
        "5/month",
        "counts for longer than a day; write one like 1000/day.",
    ),
    ("WIREGUARD_AUDIT_KEEP", "0", "is no number of days from 1 to 99999; write one like 365."),
    ("WIREGUARD_AUDIT_KEEP", "1 year", "is no number of days from 1 to 99999; write one like 365."),
    ("ACCESS_LOG", "perhaps", "is neither true nor false; write one of the two."),
    ("LOG_LEVEL", "loud", "is unknown; write one of critical, error, warning, info, debug."),
    (
        "STATE_DIRECTORY",
        ":/var/lib/other",
        "names no directory; write one like /var/lib/wireguard-provisioning.",
    ),
]


@pytest.mark.parametrize(("name", "value", "sentence"), WRONG)
def test_a_wrong_setting_is_named_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, sentence: str
) -> None:
    monkeypatch.setenv(name, value)
    assert refusal() == f"{name} {sentence}"


@pytest.mark.parametrize(
    "endpoint",
    [
        "hub.example.com",
        ":51820",
        "2001:db8::1:51820",
        "[fe80::1%eth0]:51820",
        "[hub]:1",
        "192.0.2.256:1",
        "1.2.3:1",
        "-hub:1",
        "hub-.example:1",
        "a..b:1",
        "hub name:1",
        "hub\nPostUp=x:1",
        "h\u00fcb:1",
        f"{'a' * 64}:1",
        f"{'a.' * 127}a:1",
    ],
)
def test_an_endpoint_without_a_host_is_refused(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setenv("WIREGUARD_HUB_ENDPOINT", endpoint)
    assert refusal().startswith(
        "WIREGUARD_HUB_ENDPOINT is not host:port; write one like hub.example.com:51820"
    )


@pytest.mark.parametrize("port", ["", "0", "65536", "-1", "http", "051820", "\u0661"])
def test_an_endpoint_without_a_port_is_refused(monkeypatch: pytest.MonkeyPatch, port: str) -> None:
    monkeypatch.setenv("WIREGUARD_HUB_ENDPOINT", f"hub:{port}")
    assert refusal() == (
        "WIREGUARD_HUB_ENDPOINT has no usable port; write a number from 1 to 65535 after the last colon."
    )


@pytest.mark.parametrize(
    "path",
    [
        "/etc/wireguard/wg0",
        "/etc/wireguard/.conf",
        "/etc/wireguard/-wg.conf",
        "/etc/wireguard/...conf",
        "/etc/wireguard/sixteen-letters-.conf",
        "/etc/wireguard/wg 0.conf",
        "/etc/wireguard/wg0.conf\n",
    ],
)
def test_a_config_whose_name_is_no_interface_is_refused(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setenv("WIREGUARD_CONFIG_PATH", path)
    if path.endswith("\n"):  # white space around a value is nobody's intention
        assert load_settings().interface == "wg0"
    else:
        assert refusal().startswith("WIREGUARD_CONFIG_PATH must end in INTERFACE.conf")


def test_a_path_with_a_nul_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("STATE_DIRECTORY=/var/\0lib\n")
    assert refusal() == "STATE_DIRECTORY holds a NUL character, which no path can; write it without."


def test_a_default_that_does_not_fit_the_pool_is_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WIREGUARD_IP_POOL", "10.77.0.0/24")
    assert refusal() == (
        "WIREGUARD_HUB_IP (10.0.0.1) is outside of WIREGUARD_IP_POOL (10.77.0.0/24); set it to 10.77.0.1."
    )


def test_the_first_of_several_mistakes_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOG_LEVEL", "loud")
    monkeypatch.setenv("WIREGUARD_IP_POOL", "10.0.0.5/24")
    assert refusal() == "WIREGUARD_IP_POOL has host bits set; write 10.0.0.0/24."


def test_the_first_of_several_state_directories_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/one:/var/lib/two")
    settings = load_settings()
    assert settings.state_directory == Path("/var/lib/one")
    assert settings.database_url == "sqlite:////var/lib/one/provisioning.sqlite"


@pytest.mark.parametrize(
    ("given_url", "url"),
    [
        ("postgresql://u:p%40@db/x", "postgresql+psycopg://u:p%40@db/x"),
        ("postgres://u@db/x", "postgresql+psycopg://u@db/x"),
        ("postgresql+psycopg://u:p@db:5433/x?sslmode=require", None),
        ("sqlite:////srv/records.sqlite", None),
    ],
)
def test_database_urls_of_both_kinds_are_taken(
    monkeypatch: pytest.MonkeyPatch, given_url: str, url: str | None
) -> None:
    monkeypatch.setenv("DATABASE_URL", given_url)
    assert load_settings().database_url == (url or given_url)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("mysql://u:hunter2@db/x", "is of a kind that isn't supported"),
        ("postgresql+asyncpg://u:hunter2@db/x", "is of a kind that isn't supported"),
        ("hunter2", "is of a kind that isn't supported"),
        ("postgresql://u:hunter2@db:port/x", "can't be read as a URL"),
        ("postgresql://u:hunter2@db:/x", "can't be read as a URL"),
        ("sqlite://hunter2", "names no file"),
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        # Through it a second hub got at records that the first had locked.
        ("sqlite:///file:/srv/hunter2.sqlite?uri=true", "has the option uri"),
    ],
)
def test_a_refused_database_url_is_not_repeated(
    monkeypatch: pytest.MonkeyPatch, url: str, reason: str
) -> None:
    monkeypatch.setenv("DATABASE_URL", url)
    sentence = refusal()
    assert sentence.startswith(f"DATABASE_URL {reason}")
    assert "hunter2" not in sentence


@pytest.mark.parametrize("limit", ["1/second", "10 per 2 hours", "1000/day", " 5 / 3 minutes "])
def test_rate_limits_are_taken_in_the_librarys_notation(monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setenv("WIREGUARD_RATE_LIMIT_SOURCE", limit)
    assert load_settings().rate_limits[LimitKind.SOURCE] == limit.strip()


@pytest.mark.parametrize(
    "url", ["redis://cache", "redis://u:p%40@[2001:db8::1]:6379/3", "rediss://:p@cache/"]
)
def test_redis_may_count(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("WIREGUARD_RATE_LIMIT_STORAGE", url)
    assert load_settings().wireguard_rate_limit_storage == url


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("memcached://u:hunter2@cache", "is of a kind that isn't supported"),
        ("hunter2", "is of a kind that isn't supported"),
        ("redis://:hunter2@", "can't be read as"),
        ("redis://:hunter2@cache:port", "can't be read as"),
        ("redis://:hunter2@[cache", "can't be read as"),
        ("redis://:hunter2#1@cache", "can't be read as"),
        ("redis://:hunter2@cache/zero", "can't be read as"),
        ("redis://cache/0?password=hunter2", "can't be read as"),
    ],
)
def test_a_refused_storage_url_is_not_repeated(
    monkeypatch: pytest.MonkeyPatch, url: str, reason: str
) -> None:
    monkeypatch.setenv("WIREGUARD_RATE_LIMIT_STORAGE", url)
    sentence = refusal()
    assert sentence.startswith(f"WIREGUARD_RATE_LIMIT_STORAGE {reason}")
    assert "hunter2" not in sentence


def test_the_password_is_not_in_the_representation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://u:hunter2@db/x")
    monkeypatch.setenv("WIREGUARD_RATE_LIMIT_STORAGE", "redis://:hunter2@cache")
    settings = load_settings()
    assert "hunter2" in settings.database_url
    assert "hunter2" not in f"{settings!r} {settings}"


def test_a_mistake_elsewhere_does_not_show_the_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://u:hunter2@db/x")
    monkeypatch.setenv("WIREGUARD_RELOAD", "restart")
    assert "hunter2" not in refusal()
    with pytest.raises(ValueError, match="neither syncconf nor off") as caught:
        Settings()
    assert "hunter2" not in str(caught.value)


def test_the_hubs_public_key_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WIREGUARD_HUB_PUBLIC_KEY", KEY)
    assert load_settings().wireguard_hub_public_key == KEY


def test_an_env_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"WIREGUARD_RELOAD=\xff\n")
    assert refusal() == f"{tmp_path}/.env can't be read (it isn't UTF-8 text); mend it or take it away."


def test_an_env_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    # Its first page is never mapped, so that reading it fails for root too. Another user can't open it in a
    # process whose memory is kept private, as this one's is once a command has run in it.
    (tmp_path / ".env").symlink_to("/proc/self/mem")
    reason = "Input/output error|Permission denied"
    expected = rf"{tmp_path}/\.env can't be read \(({reason})\); mend it or take it away\."
    assert re.fullmatch(expected, refusal())


def test_an_env_file_that_others_may_write_is_refused_with_the_remedy(tmp_path: Path) -> None:
    """It says which database, which config and which credentials count."""
    path = tmp_path / ".env"
    path.write_text("WIREGUARD_RELOAD=off\n")
    path.chmod(0o646)
    with pytest.raises(StartRefusedError) as caught:
        load_settings()
    assert str(caught.value) == (
        f"the file of settings {path} is within other users' reach: they can write to {path} (mode 0646); "
        f"run `chmod go-w {path}`, or choose another place"
    )
    path.chmod(0o604)
    assert load_settings().wireguard_reload is ReloadMode.OFF
    tmp_path.chmod(0o777)
    with pytest.raises(StartRefusedError, match=rf"they can write to {tmp_path} \(mode 0777\)"):
        load_settings()
    # One that isn't there harms nobody.
    path.unlink()
    assert load_settings().wireguard_reload is ReloadMode.SYNCCONF


def test_env_file_of_another_user_is_refused(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to give a file away")
    path = tmp_path / ".env"
    path.touch(0o644)
    os.chown(path, 4711, -1)
    with pytest.raises(StartRefusedError, match=f"{path} belongs to 4711; run `chown root {path}`"):
        load_settings()


def test_an_env_file_that_comes_after_the_look_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where others may make files, one of them could."""

    def look_then_lay() -> Path | None:
        found = trusted_env_file()
        (tmp_path / ".env").write_text("WIREGUARD_RELOAD=off\n")
        return found

    monkeypatch.setattr("backend.settings.trusted_env_file", look_then_lay)
    assert load_settings().wireguard_reload is ReloadMode.SYNCCONF


@given(st.text(alphabet="abAB01.:-_[]% \n\0/@", max_size=40))
def test_accepted_endpoint_is_harmless_in_a_config_line(text: str) -> None:
    try:
        settings = Settings(wireguard_hub_endpoint=text)
    except ValueError:
        return
    host, _, port = settings.wireguard_hub_endpoint.rpartition(":")
    assert host
    assert 1 <= int(port) <= 65535
    assert not set(settings.wireguard_hub_endpoint) & set(" \n\0/@%")
