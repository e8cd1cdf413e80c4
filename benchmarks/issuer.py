"""An issuer of one JWT, and the keys to check it with, for a peer that takes OIDC.

python benchmarks/issuer.py PORT FILE AUDIENCE        writes the JWT to FILE, then serves the keys until killed
"""

from __future__ import annotations

import base64
import json
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa


def text(data: bytes) -> str:
    """As JOSE writes bytes."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def number(value: int) -> str:
    """As JOSE writes a number."""
    return text(value.to_bytes((value.bit_length() + 7) // 8, "big"))


def main() -> None:
    """Make the key and the JWT, and serve."""
    port, file, audience = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    url = f"http://127.0.0.1:{port}"
    key = rsa.generate_private_key(65537, 2048)
    public = key.public_key().public_numbers()
    kind = {"alg": "RS256", "kid": "1"}
    keys = {"keys": [{**kind, "kty": "RSA", "use": "sig", "n": number(public.n), "e": number(public.e)}]}
    now = int(time.time())
    claims = {"iss": url, "aud": audience, "sub": "analyst", "iat": now, "exp": now + 86400}
    signed = ".".join(text(json.dumps(one).encode()) for one in ({**kind, "typ": "JWT"}, claims))
    signature = key.sign(signed.encode(), padding.PKCS1v15(), hashes.SHA256())
    file.touch(0o600)
    file.write_text(f"{signed}.{text(signature)}", encoding="ascii")
    pages: dict[str, Any] = {"/keys": keys}

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = json.dumps(pages.get(self.path, {"issuer": url, "jwks_uri": f"{url}/keys"})).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)

    HTTPServer(("127.0.0.1", port), Page).serve_forever()


if __name__ == "__main__":
    main()
