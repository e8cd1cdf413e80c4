"""Fernet keys: seal a database password, open it again, and rotate the keys.

`secret.key` holds one key a line, the newest first: what is sealed is sealed with the first, and opened with whichever
of them fits. A sealed text is `sealed:v1:` and a Fernet token (AES-128-CBC with HMAC-SHA-256; the specification is
github.com/fernet/spec). Under systemd the server reads the credential of the same name instead
(`$CREDENTIALS_DIRECTORY/secret.key`), of which `keyring.file` is the source.
"""

import base64
import binascii
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from cryptography.fernet import Fernet, InvalidToken, MultiFernet

from mcpctl import private_file
from mcpctl.errors import ConfigError, NotFoundError
from mcpctl.private_file import Fingerprint

PREFIX = "sealed:v1:"
CREDENTIAL = "secret.key"


def is_sealed(text: str) -> bool:
    """Whether a text is one that `seal` has made."""
    return text.startswith(PREFIX)


def new_key() -> str:
    """A key, as a line of the file."""
    return Fernet.generate_key().decode("ascii")


def key_id(key: str) -> str:
    """How messages call a key: the first 8 hex digits of its SHA-256."""
    return hashlib.sha256(key.encode("ascii")).hexdigest()[:8]


def parse(data: bytes, path: Path) -> list[str]:
    """The keys of such a file, the newest first. ConfigError for a line that is none; it is not shown."""
    keys = []
    for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        try:
            right = len(base64.b64decode(text, altchars=b"-_", validate=True)) == 32
        except (binascii.Error, ValueError):
            right = False
        if not right:
            raise ConfigError(f"{path}:{number}: is no Fernet key", "restore the file from your backup of it")
        keys.append(text)
    if not keys:
        raise ConfigError(f"{path}: holds no key", "restore the file from your backup of it")
    return keys


def opens_alone(key: str, sealed: str) -> bool:
    """Whether that one key opens it."""
    try:
        Fernet(key).decrypt(sealed.removeprefix(PREFIX).encode("utf-8"))
    except InvalidToken:
        return False
    return True


def place(file: Path, environ: Mapping[str, str] = os.environ) -> Path:
    """Where a server finds its keys: systemd's credential where it was given one, else the config's file."""
    folder = environ.get("CREDENTIALS_DIRECTORY")
    credential = Path(folder, CREDENTIAL) if folder else None
    return credential if credential is not None and credential.exists() else file


def rules(path: Path) -> dict[str, int]:
    """What `private_file.read` takes for a file that may be a credential of systemd's (systemd.exec(5),
    LoadCredential=): that is root's, and 0440. A file of ours has no bit for its group."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    return {"mode": 0o440, "trusted_owner": 0} if folder and path.parent == Path(folder) else {}


class Keyring:
    """The keys of one file. A key that was once there still opens in this process, so that a rotation loses no call."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._keys: list[str] = []
        self._fingerprint: Fingerprint | None = None
        self._earlier: list[str] = []

    def keys(self) -> Sequence[str]:
        """The keys that the file holds now, the newest first. ConfigError where it is missing or broken."""
        now = private_file.fingerprint(self.path)
        if now != self._fingerprint or now == private_file.ABSENT:
            try:
                found_by = {"trusted_owner": 0, **rules(self.path)}
                content = private_file.read(self.path, limit=1 << 20, **found_by)
            except NotFoundError:
                raise ConfigError(
                    f"there is no key file {self.path}, and something is sealed with it",
                    "restore it from your backup; without it database passwords are lost, and must be set anew",
                ) from None
            found = parse(content.data, self.path)
            self._earlier = [*self._keys, *self._earlier][:8]
            self._keys, self._fingerprint = found, content.fingerprint
        return self._keys

    def ids(self) -> list[str]:
        """The ids of the keys that the file holds now; none where there is no file."""
        return [key_id(key) for key in self.keys()] if self.path.exists() else []

    def seal(self, text: str, beside: Iterable[tuple[str, str]] = ()) -> str:
        """The text, sealed with the newest key. ConfigError (exit 3) where another key has sealed what is `beside` it,
        (sealed, what it is): the two could be opened with neither file."""
        for sealed, what in beside:
            self.check_opens(sealed, what)
        return PREFIX + Fernet(self.keys()[0]).encrypt(text.encode("utf-8")).decode("ascii")

    def check_opens(self, sealed: str, what: str) -> None:
        """ConfigError (exit 3) where none of the keys that the file holds now opens it."""
        if not any(opens_alone(key, sealed) for key in self.keys()):
            raise ConfigError(
                f"{self.path} holds another key than {what} was sealed with, and nothing is sealed with it",
                "restore the key file that it was sealed with",
            )

    def open(self, sealed: str, what: str) -> str:
        """The text behind it. ConfigError (exit 3) naming the key file and `what` where no key fits."""
        if not is_sealed(sealed):
            raise ConfigError(f"{what} is not sealed as mcpctl does it", "set the password anew")
        token = sealed.removeprefix(PREFIX).encode("utf-8")
        keys = self.keys()
        try:
            return MultiFernet([Fernet(key) for key in (*keys, *self._earlier)]).decrypt(token).decode("utf-8")
        except InvalidToken:
            raise ConfigError(
                f"{what} cannot be opened with any key of {self.path}",
                "restore the key file that it was sealed with, or set the password anew",
            ) from None
