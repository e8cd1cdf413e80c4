"""What is kept of one server between two runs: a token, or what a sign-in has led to. One file a server, 0600, in the
user's own config folder.

Where the operating system has a keyring that we can use (`pip install 'mcpctl[keyring]'`), the file is sealed, and its
key is in the keyring. The keyring alone would be too small: Windows takes 1,280 characters, and a JWT may be longer.
"""

import asyncio
import contextlib
import hashlib
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Protocol

from mcpctl import private_file
from mcpctl.errors import ConfigError, NotFoundError

_SERVICE = "mcpctl connect"
_LEAST = 1
"""The priority from which on the library itself calls a keyring usable; plain files of keyrings.alt are below."""


class Vault(Protocol):
    """A place for one secret a server."""

    def get(self, url: str) -> str | None: ...
    def put(self, url: str, secret: str) -> None: ...
    def forget(self, url: str) -> None: ...


class _Keyring:
    """The operating system's keyring."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def get(self, url: str) -> str | None:
        found: str | None = self._backend.get_password(_SERVICE, url)
        return found

    def put(self, url: str, secret: str) -> None:
        self._backend.set_password(_SERVICE, url, secret)

    def forget(self, url: str) -> None:
        self._backend.delete_password(_SERVICE, url)


def keyring() -> Vault | None:
    """The operating system's keyring; None where it is not installed, or has nothing behind it."""
    try:
        from keyring import get_keyring

        backend = get_keyring()
    except ImportError:  # of the library, or of the backend that PYTHON_KEYRING_BACKEND names
        return None
    try:
        usable = backend.priority >= _LEAST
    except RuntimeError:  # how a backend says that it cannot work here
        usable = False
    return _Keyring(backend) if usable else None


class Kept:
    """The record of one server. `find_vault` is asked only where a keyring is needed: to look for one takes time."""

    def __init__(self, folder: Path, url: str, find_vault: Any = keyring) -> None:
        self.url = url
        self.path = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:24]}.json"
        self._find_vault = find_vault

    def read(self) -> dict[str, Any] | None:
        """The record, or None where there is none. Raises ConfigError for a file that cannot be believed, or whose key
        is gone."""
        try:
            data = private_file.read(self.path, limit=1 << 20).data
        except NotFoundError:
            return None
        try:
            found = json.loads(data)
            if found["version"] != 1 or found["url"] != self.url:
                raise ValueError
            record = self._opened(found["sealed"]) if "sealed" in found else found["record"]
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{self.path} is not what was kept there", self._hint()) from None
        if not isinstance(record, dict):
            raise ConfigError(f"{self.path} is not what was kept there", self._hint())
        return record

    def _hint(self) -> str:
        return f"`mcpctl connect {self.url} --sign-out` forgets it; then sign in again"

    def _opened(self, sealed: str) -> Any:
        from cryptography.fernet import Fernet, InvalidToken

        vault: Vault | None = self._find_vault()
        if vault is None:
            said = f"{self.path} is sealed, and there is no keyring in this session, where its key would be"
            raise ConfigError(said, f"start it in your desktop's session; or {self._hint()}")
        key = _asked(lambda: vault.get(self.url), self._hint())
        if key is None:
            raise ConfigError(f"{self.path} is sealed, and the system's keyring has no key for it", self._hint())
        try:
            return json.loads(Fernet(key).decrypt(sealed.encode()))
        except InvalidToken:
            raise ValueError from None

    def write(self, record: dict[str, Any]) -> bool:
        """Keep a record, in one step; True where it is sealed. Raises ConfigError or FullError."""
        vault: Vault | None = self._find_vault()
        what: dict[str, Any] = {"version": 1, "url": self.url}
        if vault is None:
            what["record"] = record
        else:
            from cryptography.fernet import Fernet

            key = _asked(lambda: self._key(vault), "unlock it, or uninstall `keyring` to keep a 0600 file")
            what["sealed"] = Fernet(key).encrypt(json.dumps(record).encode()).decode()
        self._replace(json.dumps(what).encode() + b"\n")
        return vault is not None

    def _key(self, vault: Vault) -> str:
        """The server's key in the keyring. It stays the same, since others may be reading the file meanwhile."""
        from cryptography.fernet import Fernet

        key = vault.get(self.url)
        if key is None:
            key = Fernet.generate_key().decode()
            vault.put(self.url, key)
        return key

    def _replace(self, data: bytes) -> None:
        self._make_folder()
        beside = self.path.with_suffix(f".{os.urandom(6).hex()}.new")
        private_file.create(beside, data)
        try:
            os.replace(beside, self.path)
        except OSError as problem:
            beside.unlink(missing_ok=True)
            raise private_file.not_written(problem, f"cannot write {self.path}: {problem.strerror}") from None

    def _make_folder(self) -> None:
        private_file.check_folder(self.path.parent)
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as problem:
            said = f"cannot make {self.path.parent}: {problem.strerror}"
            raise ConfigError(said, "check the mode of the folder above, or set XDG_CONFIG_HOME") from None

    def forget(self) -> bool:
        """Forget the record, and the key of it; False where there was none."""
        try:
            self.path.unlink()
            found = True
        except (FileNotFoundError, NotADirectoryError):
            found = False
        vault: Vault | None = self._find_vault()
        if vault is not None and _asked(lambda: vault.get(self.url), "unlock it, and try again") is not None:
            _asked(lambda: vault.forget(self.url), "unlock it, and try again")
        return found

    @contextlib.asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Keep other bridges to the same server from renewing the same token: a refresh token that is used twice may
        end the sign-in (RFC 9700, section 4.14.2)."""
        self._make_folder()
        fd = private_file.open_checked(self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT)
        try:
            while True:
                try:
                    private_file.lock(fd, 0.0)
                    break
                except _HELD:
                    await asyncio.sleep(_PAUSE)
            yield
        finally:
            os.close(fd)


_PAUSE = 0.05
_HELD = TimeoutError if private_file.POSIX else OSError
"""What says that another has the lock: Windows says so after ten seconds, and calls it something else."""


def _asked(what: Any, hint: str) -> Any:
    """What a keyring answers; its own failures, of which each backend has others, as an Error."""
    try:
        return what()
    except Exception as problem:  # noqa: BLE001 - a backend raises what its system raises
        said = str(problem) or type(problem).__name__
        raise ConfigError(f"the system's keyring does not answer: {said[:200]}", hint) from None
