"""Encryption as age has it (age-encryption.org/v1), so that `age -d` opens a backup too, wherever mcpctl is not.

For recipients it is a stream: whatever the size of the log, it needs little memory. A passphrase goes through memory as
a whole, since the library has no other way, and so is bounded.
"""

import contextlib
import io
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, BinaryIO, cast

from mcpctl.errors import ConfigError, Error, UsageError

MOST = 256 << 20
"""Bytes that may be encrypted with a passphrase."""
LEAST = 12
"""Characters of a passphrase. scrypt makes each guess cost a second (age's own work factor)."""
_HEAD = b"age-encryption.org/v1\n"
_ARMOR = b"-----BEGIN AGE ENCRYPTED FILE-----"
_IDENTITY = "AGE-SECRET-KEY-"


@dataclass(frozen=True)
class Recipients:
    """Public keys: whoever has one of the private ones can open it."""

    keys: Sequence[Any] = field(repr=False)


@dataclass(frozen=True)
class Identities:
    """Private keys, one of which opens it."""

    keys: Sequence[Any] = field(repr=False)


@dataclass(frozen=True)
class Passphrase:
    """What a person has thought of."""

    text: str = field(repr=False)


def recipients(texts: Sequence[str], where: str) -> Recipients:
    """The public keys that these texts are: age1…, ssh-ed25519 … or ssh-rsa …. UsageError for what is none, which is
    not repeated: it may be the private one."""
    return Recipients([_recipient(text, where) for text in texts])


def _recipient(text: str, where: str) -> Any:
    import pyrage

    if text.upper().startswith(_IDENTITY):
        hint = "`age-keygen -y` says the public one; whoever has seen this one can open your backups: make a new one"
        raise UsageError(f"{where} holds a private key", hint)
    kind = pyrage.ssh.Recipient if text.startswith("ssh-") else pyrage.x25519.Recipient
    try:
        return kind.from_str(text)
    except pyrage.RecipientError:
        raise UsageError(
            f"{where}: that is no public key of age's", "it begins with age1, or with ssh-ed25519 or ssh-rsa"
        ) from None


def listed(data: bytes) -> list[str]:
    """The lines of a file of keys, without its comments."""
    lines = (line.strip() for line in data.decode("utf-8", "replace").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def identities(data: bytes, where: str) -> Identities:
    """The private keys of such a file: age's own, or one of SSH's without a passphrase."""
    import pyrage

    try:
        if data.lstrip().startswith(b"-----BEGIN"):
            return Identities([pyrage.ssh.Identity.from_buffer(data)])
        found = [pyrage.x25519.Identity.from_str(line) for line in listed(data)]
    except pyrage.IdentityError:
        found = []
    if not found:
        raise UsageError(f"{where} holds no private key of age's", f"a line of it begins with {_IDENTITY}1")
    return Identities(found)


def needs_passphrase(file: BinaryIO) -> bool:
    """Whether a passphrase opens it, and no key. ConfigError for what age did not make. The file stays where it is."""
    head = file.read(len(_HEAD) + 12)
    file.seek(0)
    if head.startswith(_HEAD):
        return head[len(_HEAD) :].startswith(b"-> scrypt ")
    if head.startswith(_ARMOR[: len(head)]) and head:
        raise ConfigError("this is an armored file, and mcpctl makes none", "age -d opens it")
    raise ConfigError("this is no backup of mcpctl's: age did not encrypt it", "is it the right file, and all of it?")


@contextlib.contextmanager
def encrypting(to: Recipients | Passphrase, fd: int) -> Iterator[IO[bytes]]:
    """Where the plain bytes are written to; the file has all of the encrypted ones when the block has ended. Raises
    FullError, NotWrittenError where it could not be written whole."""
    import pyrage

    out = _Written(fd)
    if isinstance(to, Passphrase):
        plain = _Bounded()
        yield plain
        out.write(pyrage.passphrase.encrypt(plain.getvalue(), to.text))
        return
    reading, writing = os.pipe()
    source = os.fdopen(reading, "rb")
    work = _Beside(lambda: pyrage.encrypt_io(source, cast(io.BufferedIOBase, out), to.keys), source)
    try:
        with os.fdopen(writing, "wb") as sink:
            yield sink
    except BrokenPipeError:
        work.join()
        out.check()
        work.check()
        raise
    finally:
        work.join()
    out.check()
    work.check()


class _Written(io.RawIOBase):
    """Writes to a descriptor, and remembers what went wrong: the library says nothing of what fails at its end."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._failed: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        left = memoryview(data)
        try:
            while left:
                left = left[os.write(self._fd, left) :]
        except OSError as problem:
            self._failed = self._failed or problem
            raise
        return len(data)

    def check(self) -> None:
        """Raises what went wrong."""
        if self._failed is not None:
            raise self._failed


@contextlib.contextmanager
def decrypting(key: Identities | Passphrase, file: BinaryIO) -> Iterator[IO[bytes]]:
    """The plain bytes of an encrypted file. What is wrong with it is a ConfigError, at the end of the block at the
    latest: until then none of them can be believed."""
    import pyrage

    if isinstance(key, Passphrase):
        data = file.read(MOST + (1 << 20))
        try:
            plain = pyrage.passphrase.decrypt(data, key.text)
        except (pyrage.DecryptError, OSError):
            raise ConfigError("the passphrase does not open it, or it is damaged", "nothing was changed") from None
        yield io.BytesIO(plain)
        return
    reading, writing = os.pipe()
    sink = os.fdopen(writing, "wb")
    work = _Beside(lambda: pyrage.decrypt_io(cast(io.BufferedIOBase, file), sink, key.keys), sink)
    try:
        with os.fdopen(reading, "rb") as source:
            yield source
            while source.read(1 << 20):  # so that the end of it is proved, too
                pass
    finally:
        work.join()
        if work.failed is not None and not isinstance(work.failed, BrokenPipeError):
            raise _damaged(work.failed) from None


def _damaged(problem: BaseException) -> Error:
    if "No matching keys" in str(problem):
        return ConfigError("none of these keys opens it", "name the file of the private key with --identity")
    return ConfigError("it is damaged, or not all of it is here", "nothing was changed; take another copy of it")


class _Bounded(io.BytesIO):
    def write(self, data: Any) -> int:
        if self.tell() + len(data) > MOST:
            raise Error(
                f"there is more than {MOST >> 20} MiB, and a passphrase takes no more",
                "encrypt it for a recipient: age-keygen makes one",
            )
        return super().write(data)


class _Beside:
    """Work in a thread of its own, at one end of a pipe that it closes."""

    def __init__(self, work: Callable[[], object], end: IO[bytes]) -> None:
        self.failed: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(work, end))
        self._thread.start()

    def _run(self, work: Callable[[], object], end: IO[bytes]) -> None:
        try:
            try:
                work()
            finally:
                with contextlib.suppress(BrokenPipeError):
                    end.close()
        except Exception as problem:  # noqa: BLE001 - whoever waits for us raises it
            self.failed = problem

    def join(self) -> None:
        self._thread.join()

    def check(self) -> None:
        """Raises what went wrong."""
        if self.failed is not None:
            raise Error(f"the backup cannot be encrypted: {self.failed}", "are all recipients right?")
