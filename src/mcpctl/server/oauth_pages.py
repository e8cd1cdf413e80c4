"""What people see of the authorization server: they sign in, allow a client or don't, and end what they have allowed.

Nothing is kept between two pages: a form goes to the URL that its page had, and what the client asked for is read from
there and checked once more. A form's token belongs to that URL, the browser and the user.

Consent is remembered for clients alone that have proved who they are (the config lists them, or their document was read
from their own host) and are answered at https. Whoever else asks could be any program on the user's machine, or anybody
on the web, under any name (RFC 8252, section 8.6; RFC 6819, section 5.2.4.1): the user is asked each time.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from hashlib import sha256

from mcpctl import redirect_uris
from mcpctl.errors import BusyError, Error, LimitedError, UnauthorizedError, UsageError
from mcpctl.identity import oauth, oauth_clients
from mcpctl.identity.browsers import LIFE, Browsers
from mcpctl.identity.oauth import Allowed
from mcpctl.identity.sessions import mark_of
from mcpctl.identity.tokens import in_networks
from mcpctl.identity.users import User
from mcpctl.in_turn import in_turn
from mcpctl.policy.scopes import OFFLINE
from mcpctl.server import asked, forms, pages
from mcpctl.server.asked import Asked, RefusedError
from mcpctl.server.exchange import MethodError, Receive, Scope, Send
from mcpctl.server.forms import Cookie, FormTokens
from mcpctl.server.noted import MALFORMED, Noted
from mcpctl.server.oauth import Parts
from mcpctl.server.pages import Answer, Form, Pages
from mcpctl.server.refusals import outside
from mcpctl.server.routes import Host, Route, Routes

Prove = Callable[[str, str, str | None, str], Awaitable[User]]
"""The user of a name and a password, for whoever comes from an address with a request's id. UnauthorizedError for all
that is wrong with them, LimitedError for too many tries; the audit log has been told."""
Databases = Callable[[User, Sequence[str]], Sequence[str]]
"""The databases that a user may read with these permissions."""
CONNECTIONS, LOGIN, LOGOUT, AUTHORIZE = "/connections", "/login", "/logout", "/authorize"
_WRONG = "User name or password is wrong."


@dataclass(frozen=True, slots=True)
class _Visit:
    """One request, and whose browser it is. `cookie` is what the browser shows, `set` what it is to keep."""

    scope: Scope
    receive: Receive
    host: Host
    address: str | None
    request_id: str
    origin: str
    jar: Cookie
    cookie: str | None

    @property
    def query(self) -> str:
        found: bytes = self.scope["query_string"]
        return found.decode("latin-1")

    @property
    def posts(self) -> bool:
        return bool(self.scope["method"] == "POST")


class SignInPages:
    """The routes, for an app to take as one of its additions."""

    def __init__(
        self, parts: Parts, browsers: Browsers, tokens: FormTokens, prove: Prove, databases: Databases
    ) -> None:
        self._parts = parts
        self._browsers = browsers
        self._tokens = tokens
        self._prove = prove
        self._databases = databases
        self._noted = Noted()

    def __call__(self, host: Host) -> Routes:
        """See routes.py:Addition."""
        return {
            AUTHORIZE: self._route(host, self._authorize),
            LOGIN: self._route(host, self._login),
            LOGOUT: self._route(host, self._logout),
            CONNECTIONS: self._route(host, self._connections),
        }

    def _route(self, host: Host, answer: Callable[[_Visit], Awaitable[Answer]]) -> Route:
        async def route(scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
            origin = host.base(scope)
            try:
                address = host.visit(scope, request_id)
                _check_method(scope)
                self._parts.door.check_lock()
                jar = Cookie("mcpctl", https=origin.startswith("https://"))
                cookie = jar.read(scope["headers"])
                visit = _Visit(scope, receive, host, address, request_id, origin, jar, cookie)
                found = await answer(visit)
            except Error as problem:
                if problem.status in MALFORMED:
                    self._noted(scope["path"], problem, request_id)
                found = self._failed(problem, origin, request_id)
            headers = [*found.headers, (b"x-request-id", request_id.encode())]
            await send({"type": "http.response.start", "status": found.status, "headers": headers})
            await send({"type": "http.response.body", "body": found.body})

        return route

    def _failed(self, problem: Error, origin: str, request_id: str) -> Answer:
        """The page of what went wrong. What is wrong with us is not told to strangers."""
        told = outside(problem) if problem.status >= 500 else problem.message
        if isinstance(problem, LimitedError):
            told = "Too many requests"
        hint = _sentence(problem.hint) if problem.hint and problem.status < 500 else None
        found = _pages(origin).failed(problem.status, _sentence(told), request_id, hint)
        if isinstance(problem, LimitedError | BusyError):
            found.headers.append((b"retry-after", str(problem.retry_after).encode()))
        if isinstance(problem, MethodError):
            found.headers.append((b"allow", problem.allow.encode()))
        return found

    # -- /authorize ----------------------------------------------------------------------------------------------------

    async def _authorize(self, visit: _Visit) -> Answer:
        user = self._user(visit)
        try:
            wish = await asked.read(visit.scope["query_string"], self._parts.client, self._parts.scopes, visit.origin)
            return await (self._decided(visit, wish, user) if visit.posts else self._asked(visit, wish, user))
        except RefusedError as problem:
            return self._refused(visit, problem, known=user is not None)

    async def _asked(self, visit: _Visit, wish: Asked, user: User | None) -> Answer:
        """The page that comes next, or the answer, if nobody has to be asked."""
        if user is None or "login" in wish.prompt or "select_account" in wish.prompt:
            if "none" in wish.prompt:
                raise wish.refused("login_required", "nobody has signed in")
            return self._sign_in(visit, _page_client(wish), purpose=self._of_query(visit))
        if not self._is_remembered(wish, user):
            if "none" in wish.prompt:
                raise wish.refused("consent_required", "the user has to be asked")
            return self._consent(visit, wish, user)
        # no redirect: this may stand behind the sign-in's form, see pages.py
        return _pages(visit.origin).leaving(_page_client(wish), wish.answer(code=await self._code(wish, user)))

    def _is_remembered(self, wish: Asked, user: User) -> bool:
        if "consent" in wish.prompt or not _may_be_remembered(wish):
            return False
        return self._parts.connections.remembers(user, wish.client.id, wish.redirect, wish.scopes)

    def _consent(self, visit: _Visit, wish: Asked, user: User) -> Answer:
        form = Form(f"{AUTHORIZE}?{wish.query}", self._tokens.issue(visit.cookie or "", self._purpose_of(visit, user)))
        scopes = self._in_words(wish.scopes)
        databases = self._databases(user, self._parts.scopes.permissions(wish.scopes))
        return _pages(visit.origin).consent(
            form, client=_page_client(wish), user=user.name, scopes=scopes, databases=databases
        )

    async def _decided(self, visit: _Visit, wish: Asked, user: User | None) -> Answer:
        """What the person has decided."""
        found = await self._form(visit, required=("form_token", "answer"))
        if user is None:
            return self._sign_in(visit, _page_client(wish), purpose=self._of_query(visit))
        self._tokens.check(found["form_token"], visit.cookie, self._purpose_of(visit, user))
        if found["answer"] == "deny":
            raise wish.refused("access_denied", "the user has said no")
        if found["answer"] != "allow":
            raise UsageError("the form says neither yes nor no", "open the page again, and send its form as it is")
        self._parts.recorder.before_call()
        code = await self._code(wish, user)
        await in_turn(lambda: self._parts.clients.use(wish.client.id))
        if _may_be_remembered(wish):
            remember = self._parts.connections.remember
            await in_turn(lambda: remember(user.name, wish.client.id, wish.redirect, wish.scopes))
        return _pages(visit.origin).leaving(_page_client(wish), wish.answer(code=code))

    async def _code(self, wish: Asked, user: User) -> str:
        allowed = Allowed(
            wish.client,
            wish.redirect,
            wish.challenge,
            wish.scopes,
            wish.resource,
            user.name,
            mark_of(user.password),
        )
        return await in_turn(lambda: self._parts.connections.allow(allowed))

    def _refused(self, visit: _Visit, problem: RefusedError, *, known: bool) -> Answer:
        """A no, as the client hears it. A stranger is sent nowhere by itself that anybody may have registered: else a
        link to us would lead wherever its maker likes (RFC 9700, section 4.11.2). Whoever has a host can put a document
        there that names any place, so that it proves nothing here; nor does a form that another site has sent."""
        client = _client(problem.client, problem.redirect)
        if visit.posts:
            forms.check_sender(visit.scope["headers"], visit.origin)
            return _pages(visit.origin).leaving(client, problem.url)
        if known or problem.client.listed or not redirect_uris.is_web(problem.redirect):
            return _redirect(problem.url, status=302)
        raise problem

    # -- sign in, sign out ---------------------------------------------------------------------------------------------

    def _sign_in(
        self,
        visit: _Visit,
        client: pages.Client | None,
        *,
        purpose: str,
        user: str = "",
        problem: str | None = None,
        retry_after: int = 0,
    ) -> Answer:
        """The page that asks for a password, in a browser that has a cookie from then on."""
        cookie = visit.cookie or forms.new_id()
        action = f"{LOGIN}?{visit.query}" if visit.query else LOGIN
        form = Form(action, self._tokens.issue(cookie, f"sign-in {purpose}"))
        found = _pages(visit.origin).sign_in(form, client=client, user=user, problem=problem, retry_after=retry_after)
        if visit.cookie is None:
            found.headers.append(visit.jar.set(cookie))
        return found

    async def _login(self, visit: _Visit) -> Answer:
        """/login: for a client's sake, whose request stands in the query, or to see one's connections."""
        wish, client = None, None
        if visit.query:
            try:
                wish = await asked.read(
                    visit.scope["query_string"], self._parts.client, self._parts.scopes, visit.origin
                )
            except RefusedError as problem:
                return self._refused(visit, problem, known=False)
            client = _page_client(wish)
        if not visit.posts:
            if wish is None and self._user(visit) is not None:
                return _redirect(CONNECTIONS, status=302)
            return self._sign_in(visit, client, purpose=self._of_query(visit))
        found = await self._form(visit, required=("form_token", "user", "password"))
        self._tokens.check(found["form_token"], visit.cookie, f"sign-in {self._of_query(visit)}")
        name = found["user"].strip()
        try:
            user = await self._prove(name, found["password"], visit.address, visit.request_id)
        except UnauthorizedError:
            return self._sign_in(visit, client, purpose=self._of_query(visit), user=name, problem=_WRONG)
        except LimitedError as problem:
            after = problem.retry_after
            return self._sign_in(visit, client, purpose=self._of_query(visit), user=name, retry_after=after)
        return await self._signed_in(
            visit, user, f"{AUTHORIZE}?{wish.without_login}" if wish is not None else CONNECTIONS
        )

    async def _signed_in(self, visit: _Visit, user: User, there: str) -> Answer:
        """The browser has another cookie from now on: who has set the one before knows it no longer."""
        await self._sign_out(visit.cookie)
        where = {"client_ip": visit.address, "request_id": visit.request_id, "transport": "http"}
        self._parts.recorder.call(
            "auth.ok", {"user": user.name, "tenant": user.tenant, **where, "reason": "in a browser"}
        )
        cookie = forms.new_id()
        await in_turn(lambda: self._browsers.sign_in(cookie, user.name, mark_of(user.password)))
        found = _redirect(there, status=303)
        found.headers.append(visit.jar.set(cookie, LIFE))
        return found

    async def _sign_out(self, cookie: str | None) -> None:
        if cookie is not None:
            await in_turn(lambda: self._browsers.sign_out(cookie))

    async def _logout(self, visit: _Visit) -> Answer:
        if not visit.posts:
            return _redirect(CONNECTIONS, status=302)
        found, user = await self._form(visit, required=("form_token",)), self._user(visit)
        if user is not None and visit.cookie is not None:
            self._tokens.check(found["form_token"], visit.cookie, f"sign-out {user.name}")
            await self._sign_out(visit.cookie)
        done = _pages(visit.origin).done("You are signed out", "Clients that you have allowed stay connected.")
        done.headers.append(visit.jar.drop())
        return done

    # -- /connections --------------------------------------------------------------------------------------------------

    async def _connections(self, visit: _Visit) -> Answer:
        if visit.query:
            raise UsageError("this page takes nothing in the URL", "open it without")
        user = self._user(visit)
        if user is None:
            return _redirect(LOGIN, status=303) if visit.posts else _redirect(LOGIN, status=302)
        done = None
        if visit.posts:
            found = await self._form(visit, required=("form_token",), optional=("end", "end_all"))
            self._tokens.check(found["form_token"], visit.cookie, f"connections {user.name}")
            done = await self._end(visit, user, found)
        return self._shown(visit, user, done)

    async def _end(self, visit: _Visit, user: User, found: dict[str, str]) -> str:
        """End one connection of the user's, or all; what was done."""
        connections = self._parts.connections
        every = connections.of(user.name)
        which = every if found.get("end_all") == "yes" else [one for one in every if one.session.id == found.get("end")]
        ended = []
        for known in which:  # the user is asked again also where the end does not come about, and so is tried again
            await in_turn(partial(connections.forget, user.name, known.client))
            if (one := await in_turn(partial(connections.end, user.name, known.session.id))) is None:
                continue
            ended.append(one)
            self._parts.closed(
                one.session, "its user has ended it", client_ip=visit.address, request_id=visit.request_id
            )
        if not ended:
            return "There was nothing left to end."
        return f"{_title(ended[0])} was ended." if len(ended) == 1 else f"{len(ended)} connections were ended."

    def _shown(self, visit: _Visit, user: User, done: str | None) -> Answer:
        cookie = visit.cookie or ""
        end = Form(CONNECTIONS, self._tokens.issue(cookie, f"connections {user.name}"))
        leave = Form(LOGOUT, self._tokens.issue(cookie, f"sign-out {user.name}"))
        return _pages(visit.origin).connections(
            end,
            leave,
            user=user.name,
            connections=[self._card(user, one) for one in self._parts.connections.of(user.name)],
            done=done,
        )

    def _card(self, user: User, one: oauth.Connection) -> pages.Connection:
        session = one.session
        return pages.Connection(
            session.id,
            pages.Client(one.name, one.redirect, one.host, self._parts.clients.lists(one.client)),
            self._in_words(one.scopes),
            self._databases(user, one.permissions),
            session.created_at,
            session.used_at if session.used_at > session.created_at else None,
            session.address,
        )

    # -- parts of it ---------------------------------------------------------------------------------------------------

    def _user(self, visit: _Visit) -> User | None:
        """Who has signed in there, if they still may, and from that address."""
        user = self._browsers.user(visit.cookie)
        if user is None or user.tenant is None:
            return user
        place = self._parts.door.read().places.get(user.tenant)
        return user if place is not None and in_networks(place.allow_ips, visit.address) else None

    def _in_words(self, scopes: Sequence[str]) -> list[pages.Scope]:
        known = self._parts.scopes
        return [pages.Scope(name, known.words(name), known.changes(name)) for name in scopes if name != OFFLINE]

    async def _form(self, visit: _Visit, *, required: Sequence[str], optional: Sequence[str] = ()) -> dict[str, str]:
        """The fields of a form that one of our own pages has sent."""
        headers = visit.scope["headers"]
        forms.check_sender(headers, visit.origin)
        body = await visit.host.body(visit.scope, visit.receive, visit.address, forms.BODY)
        return forms.read(headers, body, required=required, optional=optional)

    @staticmethod
    def _of_query(visit: _Visit) -> str:
        return sha256(visit.scope["query_string"]).hexdigest()

    def _purpose_of(self, visit: _Visit, user: User) -> str:
        return f"consent {user.name} {self._of_query(visit)}"


def _may_be_remembered(wish: Asked) -> bool:
    return wish.client.proven and redirect_uris.is_web(wish.redirect)


def _page_client(wish: Asked) -> pages.Client:
    return _client(wish.client, wish.redirect)


def _client(one: oauth_clients.Client, redirect: str) -> pages.Client:
    return pages.Client(one.name, redirect, one.host, one.listed)


def _title(one: oauth.Connection) -> str:
    return pages.Client(one.name, one.redirect, one.host).title


def _sentence(told: str) -> str:
    """As a page says what an error does."""
    return told[:1].upper() + told[1:]


def _check_method(scope: Scope) -> None:
    if scope["method"] not in ("GET", "HEAD", "POST"):
        raise MethodError("GET, HEAD, POST")


def _redirect(url: str, *, status: int) -> Answer:
    """Lead the browser on. 303 behind a form, so that it asks with GET; 302 elsewhere (RFC 9700, section 4.12: 307
    would send the form on)."""
    headers = [
        (b"location", url.encode("ascii")),
        (b"content-length", b"0"),
        (b"cache-control", b"no-store"),
        (b"referrer-policy", b"no-referrer"),
        (b"x-content-type-options", b"nosniff"),
    ]
    return Answer(status, headers, b"")


@lru_cache(maxsize=16)
def _pages(origin: str) -> Pages:
    """The pages of one origin: there are as many as names that the gatekeeper lets in."""
    return Pages(origin, connections=CONNECTIONS)
