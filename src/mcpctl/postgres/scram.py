"""A password as PostgreSQL keeps it, made here, so that the password itself never reaches PostgreSQL or its logs.

RFC 5802 and RFC 7677 say how; PostgreSQL, "pg_authid", how it is written:
SCRAM-SHA-256$<rounds>:<salt>$<stored>:<server>.
"""

import base64
import hashlib
import hmac
import re
import secrets

ROUNDS = 4096
"""What RFC 7677 asks for at least, and PostgreSQL's default; the passwords are random, so more would buy nothing."""
VERIFIER = re.compile(r"SCRAM-SHA-256\$[0-9]+:[A-Za-z0-9+/]+={0,2}\$[A-Za-z0-9+/]{43}=:[A-Za-z0-9+/]{43}=")


def new_password() -> str:
    """256 random bits in ASCII, which SASLprep leaves as they are."""
    return secrets.token_urlsafe(32)


def verifier(role: str, password: str) -> str:
    """The verifier of a random password for a role. The same every time, so that to grant twice changes nothing: the
    salt, which is there to tell equal passwords apart, is drawn from the two."""
    salt = hashlib.sha256(f"mcpctl salt\n{role}\n{password}".encode()).digest()[:16]
    salted = hashlib.pbkdf2_hmac("sha256", password.encode("ascii"), salt, ROUNDS)
    client = hmac.digest(salted, b"Client Key", "sha256")
    stored, server = hashlib.sha256(client).digest(), hmac.digest(salted, b"Server Key", "sha256")
    text = f"SCRAM-SHA-256${ROUNDS}:{_base64(salt)}${_base64(stored)}:{_base64(server)}"
    if not VERIFIER.fullmatch(text):  # PostgreSQL would take it for a password
        raise ValueError("a SCRAM verifier that is none")
    return text


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
