"""A keyring for tests: the real library finds it by its name, and it keeps what it is given in a file."""

from __future__ import annotations

import json
import os
from pathlib import Path

from keyring.backend import KeyringBackend


class Vault(KeyringBackend):
    priority = 5.0  # type: ignore[assignment]  # a property of the class there

    @property
    def _file(self) -> Path:
        return Path(os.environ["HOME"]) / "vault.json"

    def _read(self) -> dict[str, str]:
        return dict(json.loads(self._file.read_text())) if self._file.exists() else {}

    def get_password(self, service: str, username: str) -> str | None:
        return self._read().get(f"{service} {username}")

    def set_password(self, service: str, username: str, password: str) -> None:
        self._file.write_text(json.dumps({**self._read(), f"{service} {username}": password}))

    def delete_password(self, service: str, username: str) -> None:
        left = self._read()
        del left[f"{service} {username}"]
        self._file.write_text(json.dumps(left))
