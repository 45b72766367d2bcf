"""Keys as text and files, the keyring, roles, and the answers of the ZAP handler."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import msgspec
import pytest

from llambo.broker.access import zap_handler as zap
from llambo.mesh.security import api_tokens, keyring, keys
from llambo.mesh.security.keyring import BROKER_FILE, ISSUED, RING_FILE, Folder, KeyEntry
from llambo.mesh.wire.errors import LlamboError
from llambo.mesh.wire.identity import ANYONE, CLIENT_DOMAIN, WORKER_DOMAIN, Identity, PeerKey, Role

NOW = 1_000_000


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    folder = Folder(tmp_path / "keys")
    folder.begin("tcp://box:7330")
    return folder


@pytest.fixture
def key(folder: Folder) -> PeerKey:
    return folder.add(Identity("alice", "client"), NOW)


# --- a key as text ---------------------------------------------------------------------------------------


def test_a_key_is_one_line_and_comes_back_from_it(key: PeerKey) -> None:
    line = keys.to_line(key)
    assert "\n" not in line and line.startswith(keys.PREFIX)
    assert keys.from_line(f"  {line}\n") == key


def test_the_secret_half_does_not_show(key: PeerKey) -> None:
    assert key.pair.secret not in repr(key)
    assert key.pair.secret not in repr(key.pair)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda line: "",
        lambda line: "llambo-key-2" + line[12:],
        lambda line: line[:-8],
        lambda line: line[:-20] + ("A" if line[-20] != "A" else "B") + line[-19:],
        lambda line: line + "?",
        lambda line: keys.PREFIX + "e30",
        lambda line: keys.PREFIX + "A" * 10_000,
        lambda line: keys.PREFIX + "\xe4",
    ],
)
def test_what_is_no_key_is_refused_and_not_repeated(key: PeerKey, spoil: object) -> None:
    line = spoil(keys.to_line(key))  # type: ignore[operator]
    with pytest.raises(LlamboError, match="not a key") as raised:
        keys.from_line(line)
    assert not line or line[len(keys.PREFIX) :][:20] not in raised.value.text or len(line) < 40


def test_halves_that_do_not_belong_together_are_no_key(key: PeerKey) -> None:
    other = keys.new_pair()
    mixed = PeerKey(key.address, key.broker, key.name, key.role, type(other)(key.pair.public, other.secret))
    with pytest.raises(LlamboError, match="not a key"):
        keys.from_line(keys.to_line(mixed))


# --- where a key is looked for ---------------------------------------------------------------------------


def test_a_key_may_be_given_as_a_line_a_file_or_a_credential(key: PeerKey, tmp_path: Path) -> None:
    file = tmp_path / "credentials" / keys.CREDENTIAL
    keys.write(file, key)
    assert keys.find(keys.to_line(key), {}) == key
    assert keys.find(str(file), {}) == key
    assert keys.find("", {keys.CREDENTIALS_ENV: str(file.parent)}) == key
    assert keys.find("", {}) is None
    assert keys.find("", {keys.CREDENTIALS_ENV: str(tmp_path)}) is None


def test_an_empty_credential_is_none(tmp_path: Path) -> None:
    (tmp_path / keys.CREDENTIAL).write_text("\n")
    assert keys.find("", {keys.CREDENTIALS_ENV: str(tmp_path)}) is None


def test_a_program_may_give_one_or_none_or_leave_it_to_its_environment(key: PeerKey) -> None:
    environ = {keys.KEY_ENV: keys.to_line(key)}
    assert keys.wanted(None, environ) == key
    assert keys.wanted("", environ) is None
    assert keys.wanted(key, {}) is key


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o777])
def test_a_file_that_others_can_read_or_change_is_refused(key: PeerKey, tmp_path: Path, mode: int) -> None:
    file = tmp_path / "my.key"
    file.write_text(keys.to_line(key))
    file.chmod(mode)
    with pytest.raises(LlamboError, match="chmod 600"):
        keys.find(str(file), {})


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(LlamboError, match=r"nowhere\.key cannot be read: No such file"):
        keys.find(str(tmp_path / "nowhere.key"), {})


# --- the keyring -------------------------------------------------------------------------------------------


def test_everything_in_the_folder_is_its_owners_alone(folder: Folder, key: PeerKey) -> None:
    for name in (BROKER_FILE, RING_FILE, f"{ISSUED}/alice.key"):
        assert stat.S_IMODE((folder.path / name).stat().st_mode) == 0o600, name
    for place in (folder.path, folder.path / ISSUED):
        assert stat.S_IMODE(place.stat().st_mode) == 0o700


def test_the_keyring_holds_no_secret_of_a_peer(folder: Folder, key: PeerKey) -> None:
    text = (folder.path / RING_FILE).read_text()
    assert key.pair.public in text and key.pair.secret not in text


def test_a_second_begin_keeps_what_is_there(folder: Folder) -> None:
    before = folder.broker()
    with pytest.raises(LlamboError, match="already"):
        folder.begin("tcp://other:1")
    assert folder.broker() == before


def test_a_key_is_valid_until_it_expires_or_is_revoked(folder: Folder, key: PeerKey) -> None:
    visitor = folder.add(Identity("visitor", "client"), NOW, expires=NOW + 10)
    valid = folder.ring().identities(NOW)
    assert {valid[one.pair.public].name for one in (key, visitor)} == {"alice", "visitor"}
    assert set(folder.ring().identities(NOW + 10)) == {key.pair.public}
    assert folder.revoke("alice") == 1
    assert folder.ring().identities(NOW + 10) == {}
    with pytest.raises(LlamboError, match="no key has the name 'alice'"):
        folder.export("alice")


def test_a_rotated_key_has_a_successor_with_the_same_rights_and_some_time_left(folder: Folder) -> None:
    limited = Identity("alice", "client", max_in_flight=3, models=("tiny*",))
    old = folder.add(limited, NOW)
    new = folder.rotate("alice", NOW, grace_s=60)
    assert folder.export("alice") == new
    assert folder.ring().identities(NOW) == {old.pair.public: limited, new.pair.public: limited}
    assert set(folder.ring().identities(NOW + 60)) == {new.pair.public}
    # Rotating once more forgets expired keys
    newest = folder.rotate("alice", NOW + 100, grace_s=0)
    assert set(folder.ring().identities(NOW + 100)) == {newest.pair.public}


@pytest.mark.parametrize("name", ["", "a/b", "../x", ".hidden", "-x", "a b", "x" * 65, "a\n"])
def test_a_name_that_could_not_be_a_files_is_refused(folder: Folder, name: str) -> None:
    with pytest.raises(LlamboError, match="cannot be the name of a key"):
        folder.add(Identity(name, "client"), NOW)


def test_two_keys_of_one_name_are_refused(folder: Folder, key: PeerKey) -> None:
    with pytest.raises(LlamboError, match="already"):
        folder.add(Identity("alice", "admin"), NOW)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"format": 2, "address": ""}', '{"format": 1}', "\x00"])
def test_a_keyring_that_was_damaged_is_named(folder: Folder, text: str) -> None:
    (folder.path / RING_FILE).write_text(text)
    with pytest.raises(LlamboError, match=r"keyring\.json"):
        folder.ring()


def test_the_stamp_shows_a_change_within_the_same_moment(folder: Folder, key: PeerKey) -> None:
    """Files are replaced, so the inode differs, whatever the clock is."""
    before = folder.stamp()
    file = folder.path / RING_FILE
    times = file.stat()
    folder.rotate("alice", NOW, 0)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert folder.stamp() != before


def fill(folder: Folder, count: int, now_s: int) -> list[KeyEntry]:
    """Add keys with limits, and a token for each. Their secret halves do not exist."""
    until, limits = now_s + 10**6, (2, 10, 10**9, 30, "normal", ("tiny*", "large-[ab]"))
    names = [f"client-{number}" for number in range(count)]
    made = [
        KeyEntry(f"{number:0{keys.Z85_CHARS}}", Identity(name, "client", *limits), now_s, until)  # type: ignore[arg-type]
        for number, name in enumerate(names)
    ]
    ring = folder.ring()
    keyring.store(folder.path / RING_FILE, msgspec.structs.replace(ring, entries=[*ring.entries, *made]))
    tokens = [api_tokens.ApiToken(f"{number:064}", name, now_s, until) for number, name in enumerate(names)]
    keyring.store(folder.path / api_tokens.FILE, api_tokens.TokenFile(1, tokens))
    return made


def test_a_folder_of_ten_thousand_keys_and_tokens(folder: Folder, key: PeerKey) -> None:
    """Written by the code that `llambo keys` uses, in one step each."""
    limited = fill(folder, 10_000, NOW)
    bob = folder.add(Identity("bob", "client"), NOW)
    token = api_tokens.issue(folder, "bob", NOW)
    assert folder.ring().entries[1:-1] == limited and folder.revoke("client-5000") == 1
    assert api_tokens.withdraw(folder, "client-5000") == 1
    valid = folder.ring().identities(NOW)
    assert len(valid) == 10_001 and bob.pair.public in valid and limited[5_000].public not in valid
    tokens = api_tokens.read(folder)
    assert tokens[-1].sha256 == api_tokens.sha256_of(token) and len(tokens) == 10_000
    with pytest.raises(LlamboError, match="no key has the name 'client-5000'") as raised:
        folder.revoke("client-5000")
    assert len(raised.value.text) < 500, "it lists every name"


@pytest.mark.parametrize(
    "who",
    [
        Identity("bob", "client", per_minute=-1),
        Identity("bob", "client", priority_max="best"),  # type: ignore[arg-type]
        Identity("bob", "client", models=("\ud800",)),
    ],
)
def test_what_could_not_be_read_again_is_not_written(folder: Folder, key: PeerKey, who: Identity) -> None:
    before = (folder.path / RING_FILE).read_bytes(), set(folder.path.iterdir())
    with pytest.raises(LlamboError, match=r"keyring\.json.*was not changed"):
        folder.add(who, NOW)
    assert ((folder.path / RING_FILE).read_bytes(), set(folder.path.iterdir())) == before
    assert folder.revoke("alice") == 1


def test_what_a_dead_process_has_left_is_replaced(folder: Folder) -> None:
    """In a container the next process may have the same number."""
    (folder.path / f".{RING_FILE}.{os.getpid()}").write_text("half")
    folder.add(Identity("bob", "client"), NOW)
    assert [entry.identity.name for entry in folder.ring().entries] == ["bob"]


@pytest.mark.parametrize(
    ("role", "expires", "why"), [("worker", 0, "is for a worker"), ("client", NOW - 1, "has expired")]
)
def test_a_token_that_no_gateway_accepts_is_not_made(folder: Folder, role: Role, expires: int, why: str) -> None:
    folder.add(Identity("gpu", role), NOW - 2, expires)
    with pytest.raises(LlamboError, match=f"the key of gpu {why}") as raised:
        api_tokens.issue(folder, "gpu", NOW)
    assert "llambo keys add" in raised.value.hint
    assert api_tokens.read(folder) == []


# --- who may do what ---------------------------------------------------------------------------------------


def test_what_roles_may() -> None:
    client, worker, admin = (Identity("x", role) for role in ("client", "worker", "admin"))
    assert [who.may_ask for who in (client, worker, admin, ANYONE)] == [True, False, True, True]
    assert [who.may_serve for who in (client, worker, admin, ANYONE)] == [False, True, False, True]
    assert [who.may_manage for who in (client, worker, admin, ANYONE)] == [False, False, True, True]


def test_a_workers_name_is_its_keys_or_begins_with_it_and_a_dash() -> None:
    gpu = Identity("gpu", "worker")
    assert [gpu.may_be_called(name) for name in ("gpu", "gpu-1", "gpu1", "gp", "box", "")] == [True, True] + [False] * 4
    assert ANYONE.may_be_called("whatever")


def test_models_and_priorities() -> None:
    visitor = Identity("visitor", "client", priority_max="normal", models=("tiny*", "m"))
    assert [visitor.may_use(model) for model in ("tiny-1", "m", "mm", "TINY")] == [True, True, False, False]
    assert [visitor.may_come_as(priority) for priority in ("interactive", "normal", "batch")] == [False, True, True]


# --- who may come in ---------------------------------------------------------------------------------------

RING = {"C": Identity("c", "client"), "W": Identity("w", "worker"), "A": Identity("a", "admin")}


def ask(public: str, domain: str, mechanism: bytes = b"CURVE", version: bytes = b"1.0") -> tuple[bytes, bytes]:
    """Status and user."""
    question = [version, b"7", domain.encode(), b"10.0.0.1", b"", mechanism, bytes(32)]
    reply, _ = zap.reply_to(question, public, RING)
    assert reply[:2] == [b"1.0", b"7"] and len(reply) == 6
    return reply[2], reply[4]


@pytest.mark.parametrize(
    ("domain", "let_in"), [(CLIENT_DOMAIN, "CA"), (WORKER_DOMAIN, "W"), ("llambo.other", ""), ("", "")]
)
def test_a_port_admits_its_roles_only(domain: str, let_in: str) -> None:
    for public in ("C", "W", "A", "X", ""):
        expected = (b"200", public.encode()) if public in let_in and public else (b"400", b"")
        assert ask(public, domain) == expected


@pytest.mark.parametrize("mechanism", [b"NULL", b"PLAIN", b"", b"GSSAPI"])
def test_another_mechanism_is_refused(mechanism: bytes) -> None:
    assert ask("C", CLIENT_DOMAIN, mechanism) == (b"400", b"")


@pytest.mark.parametrize("frames", [[], [b"1.0"], [b"1.0", b"7"], [b""] * 7, [b"1.0"] * 8, [b"2.0", *[b"x"] * 6]])
def test_a_question_that_is_none_is_answered_with_no(frames: list[bytes]) -> None:
    reply, why = zap.reply_to(frames, "C", RING)
    assert reply[2] == b"400"
    assert why
