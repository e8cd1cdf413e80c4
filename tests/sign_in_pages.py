"""Each page of sign-in as a test looks at it: by name, with ordinary content and with the worst there is."""

from __future__ import annotations

from datetime import UTC, datetime

from mcpctl.server.pages import Answer, Client, Connection, Form, Pages, Scope

ORIGIN = "https://db.example.com"
NOW = datetime(2026, 11, 28, 9, 5, tzinfo=UTC)
TOKEN = "1796000000.AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
CLAUDE = Client("Claude", "https://claude.ai/api/mcp/auth_callback", "claude.ai")
CODE = Client("Claude Code", "http://127.0.0.1:33418/callback")
CURSOR = Client("Cursor", "cursor://anysphere.cursor-mcp/oauth/callback")
PORTAL = Client("Reports portal", "https://reports.example.com/back", listed=True)
STRANGER = Client("Claude", "https://mcp.example.net/callback")
WORST_NAME = "<script>alert(1)</script>\"'&\u202egnp.exe\u2066\x00\x1b[31m" + "W" * 10_000
WORST = Client(WORST_NAME, "https://" + "w" * 60 + "." + "x" * 60 + "." + "y" * 60 + ".example/back?a='b'&c=d")
READING = tuple(
    Scope.of(name)
    for name in ("tools:query_database", "tools:get_schema_info", "tools:explain_query", "databases:sales:read")
)
WRITING = (*READING, Scope.of("tools:execute_statement"))
WORST_SCOPES = (Scope("<b>x</b>" + "s" * 300, "<img src=x onerror=alert(1)> " + "long " * 100, True),)


def form(action: str) -> Form:
    return Form(action, TOKEN, {"request": "r" * 43})


def connection(number: int, client: Client, *, used: bool = True) -> Connection:
    when = NOW if used else None
    address = "2001:db8:4006:812::200e" if used else None
    return Connection(f"c{number}", client, WRITING, ("sales", "warehouse-eu"), NOW.replace(month=3), when, address)


def every(pages: Pages | None = None) -> dict[str, Answer]:
    """All pages, by the name of their state."""
    made = pages or Pages(ORIGIN)
    login, end, leave = form("/login"), form("/login/connections"), form("/login/out")
    three = [connection(1, CLAUDE), connection(2, CODE, used=False), connection(3, STRANGER)]
    databases = tuple(f"{name}_{year}" for name in ("sales", "warehouse", "people") for year in range(2019, 2026))
    return {
        "sign-in": made.sign_in(login),
        "sign-in-client": made.sign_in(login, client=CLAUDE),
        "sign-in-wrong": made.sign_in(login, client=CODE, user="anna", problem="Name or password is wrong."),
        "sign-in-limited": made.sign_in(login, client=CLAUDE, user="anna", retry_after=90),
        "sign-in-worst": made.sign_in(login, client=WORST, user=WORST_NAME, problem=WORST_NAME),
        "consent": made.consent(login, client=CLAUDE, user="anna", scopes=READING, databases=("sales", "warehouse-eu")),
        "consent-loopback": made.consent(login, client=CODE, user="anna", scopes=WRITING, databases=("sales",)),
        "consent-app": made.consent(login, client=CURSOR, user="anna", scopes=READING, databases=databases),
        "consent-listed": made.consent(login, client=PORTAL, user="anna", scopes=READING, databases=("sales",)),
        "consent-stranger": made.consent(login, client=STRANGER, user="anna", scopes=READING, databases=()),
        "consent-worst": made.consent(
            login, client=WORST, user=WORST_NAME, scopes=WORST_SCOPES, databases=(WORST_NAME, "<i>", "d" * 63)
        ),
        "connections": made.connections(end, leave, user="anna", connections=three),
        "connections-ended": made.connections(end, leave, user="anna", connections=three[:1], done="Cursor was ended."),
        "connections-none": made.connections(end, leave, user="anna", connections=()),
        "connections-worst": made.connections(
            end, leave, user=WORST_NAME, connections=[connection(1, WORST), connection(2, WORST)], done=WORST_NAME
        ),
        "failed": made.failed(
            400,
            "The client asks to be answered at an address that it has not registered",
            "9f2c4e1ab0837d55",
            "Start again from the client. If it happens again, ask whoever makes it.",
        ),
        "failed-worst": made.failed(400, WORST_NAME, WORST_NAME, WORST_NAME),
        "done": made.done("You are signed out"),
        "leaving": made.leaving(CLAUDE, f"{CLAUDE.returns_to}?code=abc&state=x%22y&iss={ORIGIN}"),
        "leaving-app": made.leaving(CURSOR, f"{CURSOR.returns_to}?error=access_denied"),
        "leaving-worst": made.leaving(WORST, f"{WORST.returns_to}&code=abc"),
    }
