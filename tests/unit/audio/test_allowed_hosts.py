"""Which hosts audio may come from: spellings, ports, networks, and addresses that are not public."""

from ipaddress import ip_address

import pytest

from cesar_mqtt.audio.allowed_hosts import AllowedHosts, is_public, parse_url
from cesar_mqtt.errors import ConfigError, ErrorCode, JobFailedError


def is_admitted(url: str, *entries: str) -> bool:
    try:
        AllowedHosts(entries).admit(parse_url(url))
    except JobFailedError as exc:
        assert exc.code is ErrorCode.AUDIO_NOT_ALLOWED  # noqa: PT017
        return False
    return True


def leads(address: str, *entries: str, url: str = "http://cam.local/") -> bool:
    """Whether a name may lead there."""
    try:
        AllowedHosts(entries).admit_address(ip_address(address), parse_url(url))
    except JobFailedError as exc:
        assert exc.code is ErrorCode.AUDIO_NOT_ALLOWED  # noqa: PT017
        return False
    return True


@pytest.mark.parametrize(
    ("text", "host", "port", "request_line"),
    [
        ("http://cam.local/clip.wav?token=x#t=3", "cam.local", 80, "/clip.wav?token=x"),
        ("HTTPS://CAM.Local./a b", "cam.local", 443, "/a%20b"),
        ("http://cam.local:8080", "cam.local", 8080, "/"),
        ("http://cam.local:", "cam.local", 80, "/"),
        ("http://my_service/ä", "my_service", 80, "/%C3%A4"),
        ("http://müller.de/", "xn--mller-kva.de", 80, "/"),
        ("http://MÜLLER.de/", "xn--mller-kva.de", 80, "/"),
        ("http://192.168.1.20/", "192.168.1.20", 80, "/"),
        ("http://192.168.1.20./", "192.168.1.20", 80, "/"),
        ("http://[FD00::0:5]:81/", "fd00::5", 81, "/"),
        ("http://[::ffff:127.0.0.1]/", "127.0.0.1", 80, "/"),
        ("http://127。0。0。1/", "127.0.0.1", 80, "/"),
        ("http://good.example\\@evil.example/", "evil.example", 80, "/"),
        ("http://good.example@evil.example/", "evil.example", 80, "/"),
        ("http://a@b@evil.example/", "evil.example", 80, "/"),
        ("http://evil.example#@good.example/", "evil.example", 80, "/"),
        ("http://evil.example?@good.example/", "evil.example", 80, "/?@good.example/"),
    ],
)
def test_a_url_has_one_reading(text: str, host: str, port: int, request_line: str) -> None:
    target = parse_url(text)
    assert (target.host, target.port, target.request) == (host, port, request_line)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "clip.wav",
        "/clip.wav",
        "//cam.local/clip.wav",
        "http:cam.local/clip.wav",
        "http:///clip.wav",
        "http://:80/clip.wav",
        "file:///etc/passwd",
        "ftp://cam.local/clip.wav",
        "gopher://cam.local/",
        "concat:http://cam.local/",
        "http://2130706433/",
        "http://0x7f000001/",
        "http://0x7f.1/",
        "http://0x/",
        "http://0177.0.0.1/",
        "http://127.1/",
        "http://127.0.0.01/",
        "http://127.0.0.256/",
        "http://1.2.3.4.5/",
        "http://cam.0x7f/",
        "http://\uff11\uff12\uff17.0.0.1/",
        "http://127%2e0.0.1/",
        "http://%6c%6f%63alhost/",
        "http://cam%00.local/",
        "http://cam local/",
        "http://cam.local\t/",
        "http://cam.local\n/",
        "http://cam.local/\r\nX: y",
        "http://cam..local/",
        "http://-cam/",
        "http://.../",
        "http://" + "a" * 64 + ".de/",
        "http://" + "a." * 130 + "de/",
        "http://[::1/",
        "http://[::1]evil.example/",
        "http://[fe80::1%25eth0]/",
        "http://[fe80::1%eth0]/",
        "http://[v1.x]/",
        "http://cam.local:0/",
        "http://cam.local:65536/",
        "http://cam.local:-1/",
        "http://cam.local:http/",
        "http://cam.local:" + "9" * 5000 + "/",
        "http://\ud800.de/",
        "http://cam.local/\ud800",
        "http://cam.local/" + "a" * 70_000,
    ],
)
def test_what_has_no_clear_reading_is_refused_without_being_repeated(text: str) -> None:
    with pytest.raises(JobFailedError, match=r"^The audio URL cannot be used: write it as http://HOST/FILE") as error:
        parse_url(text)
    assert error.value.code is ErrorCode.AUDIO_NOT_ALLOWED


def test_user_and_password_are_decoded_and_never_shown() -> None:
    target = parse_url("http://us%40er:s%3Acret@cam.local:81/clip.wav?token=hidden")
    assert target.credentials == ("us@er", "s:cret")
    assert target.shown == "http://cam.local:81/clip.wav"
    assert target.authority == "cam.local:81"
    assert not any(secret in repr(target) for secret in ("us@er", "cret", "hidden"))


def test_the_authority_leaves_the_usual_port_out_and_brackets_ipv6() -> None:
    assert parse_url("https://cam.local:443/").authority == "cam.local"
    assert parse_url("http://cam.local:443/").authority == "cam.local:443"
    assert parse_url("http://[fd00::5]:81/").authority == "[fd00::5]:81"


def test_without_an_entry_urls_are_off() -> None:
    with pytest.raises(JobFailedError, match=r"not fetched from URLs here: name the host in `audio\.allowed_hosts`"):
        AllowedHosts(()).admit(parse_url("http://cam.local/"))


@pytest.mark.parametrize(
    ("entry", "admitted", "refused"),
    [
        ("cam.local", ["http://cam.local/", "https://CAM.local./"], ["http://xcam.local/", "http://a.cam.local/"]),
        ("cam.local", [], ["http://cam.local:8080/", "http://cam.local:443/", "https://cam.local:80/"]),
        ("Cam.Local.:08080", ["http://cam.local:8080/", "https://cam.local:8080/"], ["http://cam.local/"]),
        ("cam.local:*", ["http://cam.local/", "http://cam.local:1/", "https://cam.local:65535/"], ["http://cam/"]),
        ("*.lan", ["http://cam.lan/", "https://a.b.lan/"], ["http://lan/", "http://xlan/", "http://cam.lan.de/"]),
        ("*.lan:81", ["http://cam.lan:81/"], ["http://cam.lan/"]),
        ("müller.de", ["http://xn--mller-kva.de/", "http://MÜLLER.DE/"], ["http://muller.de/"]),
        ("192.168.1.20", ["http://192.168.1.20/", "http://[::ffff:192.168.1.20]/"], ["http://192.168.1.21/"]),
        ("192.168.1.20:81", ["http://192.168.1.20:81/"], ["http://192.168.1.20/"]),
        ("192.168.1.0/24", ["http://192.168.1.0/", "https://192.168.1.255/"], ["http://192.168.2.1/"]),
        ("192.168.1.0/24", [], ["http://192.168.1.1:8080/", "http://cam.local/"]),
        ("192.168.1.0/24:*", ["http://192.168.1.1:8080/", "http://192.168.1.1/"], ["http://10.0.0.1/"]),
        ("192.168.1.0/255.255.255.0", ["http://192.168.1.7/"], ["http://192.168.2.7/"]),
        ("fd00::5", ["http://[fd00::5]/", "http://[FD00:0::5]/"], ["http://[fd00::6]/"]),
        ("[fd00::5]", ["http://[fd00::5]/"], ["http://[fd00::5]:81/"]),
        ("[fd00::5]:81", ["http://[fd00::5]:81/"], ["http://[fd00::5]/"]),
        ("[fd00::/8]:*", ["http://[fd12::1]:81/"], ["http://[fe80::1]:81/"]),
        ("0.0.0.0/0", ["http://127.0.0.1/"], ["http://[::1]/", "http://localhost/"]),
    ],
)
def test_an_entry_allows_what_it_names_and_no_more(entry: str, admitted: list[str], refused: list[str]) -> None:
    assert [url for url in admitted if not is_admitted(url, entry)] == []
    assert [url for url in refused if is_admitted(url, entry)] == []


def test_several_entries_add_up() -> None:
    entries = ("nas.local", "cam.local:81", "10.0.0.0/8")
    assert is_admitted("http://cam.local:81/", *entries)
    assert is_admitted("http://10.1.2.3/", *entries)
    assert not is_admitted("http://nas.local:81/", *entries)


@pytest.mark.parametrize(
    ("url", "entry"),
    [
        ("http://cam.local:8080/x?token=y", "cam.local:8080"),
        ("http://192.168.1.20/", "192.168.1.20"),
        ("http://[fd00::5]:81/", "[fd00::5]:81"),
    ],
)
def test_a_rejection_names_the_entry_that_would_allow_it(url: str, entry: str) -> None:
    with pytest.raises(JobFailedError) as error:
        AllowedHosts(("other.local",)).admit(parse_url(url))
    assert f"add '{entry}' there" in error.value.message
    assert "token" not in error.value.message
    assert is_admitted(url, entry)


@pytest.mark.parametrize(
    "entry",
    [
        "",
        " ",
        "*",
        "*.",
        "*:80",
        "a.*.b",
        "*.*.b",
        "*cam",
        "http://cam.local",
        "cam.local/",
        "cam.local/clips",
        "user@cam.local",
        "cam.local?",
        "cam local",
        "cam..local",
        "cam.local:",
        "cam.local:0",
        "cam.local:65536",
        "cam.local:http",
        "[cam.local]",
        "[cam.local]:80",
        "[fd00::5",
        "fd00::5%eth0",
        "fd00::zz",
        "192.168.1.20/24",
        "192.168.1",
        "192.168.1.0/33",
        "192.168.01.1",
        "2130706433",
        "*.192.168.1.1",
        "::ffff:10.0.0.1",
        "::ffff:10.0.0.0/104",
    ],
)
def test_a_wrong_entry_is_named_with_its_setting(entry: str) -> None:
    with pytest.raises(ConfigError) as error:
        AllowedHosts(("good.local", entry))
    assert str(error.value).startswith(f"audio.allowed_hosts: {entry!r} cannot be used: ")


def test_a_network_with_host_bits_is_answered_with_the_right_notation() -> None:
    with pytest.raises(ConfigError, match=r"as a network it is 192\.168\.1\.0/24, and as an address it is without"):
        AllowedHosts(("192.168.1.20/24",))


PUBLIC = ["93.184.215.14", "2606:2800:21f::1", "64:ff9b::5db8:d70e", "2002:5db8:d70e::1", "::ffff:93.184.215.14"]
NOT_PUBLIC = [
    "0.0.0.0",  # noqa: S104 - an address to be refused
    "10.1.2.3",
    "100.64.0.1",
    "127.0.0.1",
    "169.254.169.254",
    "172.16.0.1",
    "192.0.2.1",
    "192.168.1.20",
    "198.18.0.1",
    "224.0.0.251",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::127.0.0.1",
    "::ffff:127.0.0.1",
    "::ffff:192.168.1.20",
    "64:ff9b::7f00:1",
    "64:ff9b::c0a8:114",
    "64:ff9b:1::5db8:d70e",
    "100::1",
    "2001::1",
    "2001:db8::1",
    "2002:7f00:1::1",
    "2002:c0a8:114::1",
    "fc00::1",
    "fd00::5",
    "fe80::1",
    "fe80::1%eth0",
    "fec0::1",
    "ff02::fb",
]


@pytest.mark.parametrize("address", PUBLIC)
def test_a_name_may_resolve_to_a_public_address(address: str) -> None:
    assert is_public(ip_address(address))
    assert leads(address, "cam.local")


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_a_name_may_not_resolve_to_an_address_that_is_not_public(address: str) -> None:
    assert not is_public(ip_address(address))
    assert not leads(address, "cam.local", "*.local:*", "10.99.0.0/16", "[fd99::/16]:*")


@pytest.mark.parametrize(
    ("address", "entry"),
    [
        ("192.168.1.20", "192.168.1.20"),
        ("192.168.1.20", "192.168.1.0/24"),
        ("192.168.1.20", "192.168.1.0/24:*"),
        ("::ffff:192.168.1.20", "192.168.1.20"),
        ("fe80::1%eth0", "fe80::/10"),
        ("2002:c0a8:114::1", "2002::/16"),
    ],
)
def test_an_entry_for_the_address_lets_a_name_resolve_to_it(address: str, entry: str) -> None:
    assert leads(address, "cam.local", entry)


def test_what_wraps_a_private_address_is_not_opened_by_the_entry_of_that_address() -> None:
    assert not leads("64:ff9b::c0a8:114", "cam.local", "192.168.1.20")


def test_the_port_counts_for_the_address_as_well_and_the_rejection_names_it() -> None:
    hosts = AllowedHosts(("cam.local:81", "192.168.1.0/24"))
    with pytest.raises(JobFailedError) as error:
        hosts.admit_address(ip_address("192.168.1.20"), parse_url("http://cam.local:81/"))
    assert error.value.message == (
        "The host 'cam.local' resolves to 192.168.1.20, which is not a public address: add '192.168.1.20:81' to "
        "`audio.allowed_hosts` as well."
    )


@pytest.mark.parametrize(
    ("base", "location", "shown", "credentials"),
    [
        ("http://u:p@cam.local/a/b?q", "c.wav", "http://cam.local/a/c.wav", True),
        ("http://u:p@cam.local/a", "/x?y#z", "http://cam.local/x", True),
        ("http://u:p@cam.local/a", "https://cam.local/x", "https://cam.local/x", True),
        ("http://u:p@cam.local/a", "//CAM.local/x", "http://cam.local/x", True),
        ("http://u:p@cam.local/a", "http://cam.local:81/x", "http://cam.local:81/x", False),
        ("http://u:p@cam.local:81/a", "https://cam.local/x", "https://cam.local/x", False),
        ("http://u:p@cam.local/a", "http://nas.local/x", "http://nas.local/x", False),
        ("http://cam.local/a", "x", "http://cam.local/x", False),
    ],
)
def test_credentials_follow_to_the_same_server_only(base: str, location: str, shown: str, *, credentials: bool) -> None:
    target = parse_url(base).redirected(location)
    assert target.shown == shown
    assert target.credentials == (("u", "p") if credentials else None)


def test_a_redirect_may_bring_credentials_of_its_own() -> None:
    target = parse_url("http://u:p@cam.local/a").redirected("http://other:word@nas.local/x")
    assert target.credentials == ("other", "word")


@pytest.mark.parametrize(
    "location",
    ["file:///etc/passwd", "ftp://cam.local/x", "javascript:0", "http://127.1/", "http://[::1/", "\x01"],
)
def test_a_redirect_to_what_is_no_http_url_is_refused(location: str) -> None:
    with pytest.raises(JobFailedError) as error:
        parse_url("http://cam.local/").redirected(location)
    assert error.value.code is ErrorCode.AUDIO_NOT_ALLOWED


def test_a_redirect_from_https_to_http_is_refused() -> None:
    with pytest.raises(JobFailedError, match=r"'cam\.local' redirects from https to http, which is not followed"):
        parse_url("https://cam.local/").redirected("http://cam.local/")
