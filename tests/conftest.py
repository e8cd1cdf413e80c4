"""Real parts for every test: PostgreSQL of the oldest and the newest version at hand, and mcpctl's server."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest
import trustme

import pg
import site_of_mcpctl as site
from mcpctl import private_file
from mcpctl.identity import entry_file, tokens
from mcpctl.postgres.embedded import Binaries
from ward import original, ward

__all__ = ["original", "ward"]  # fixtures of the doctor's tests

if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # as a shell's background job: what we start would not hear Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

_VERSIONS = pg.oldest_and_newest()

# A slow machine is no failure, and a test run writes nothing into the source tree.
hypothesis.settings.register_profile(
    "mcpctl", deadline=None, database=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("mcpctl")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is marked `newest` does not run on the oldest PostgreSQL as well."""
    out = [item for item in items if item.get_closest_marker("newest") and _is_on_an_older_one(item)]
    config.hook.pytest_deselected(items=out)
    left_out = set(out)
    items[:] = [item for item in items if item not in left_out]


def _is_on_an_older_one(item: pytest.Item) -> bool:
    given = item.callspec.params.values() if hasattr(item, "callspec") else ()
    parts = [part for value in given for part in (value if isinstance(value, tuple) else (value,))]
    return any(isinstance(part, Binaries) and part != _VERSIONS[-1] for part in parts)


@pytest.fixture
def file(tmp_path: Path) -> entry_file.EntryFile[tokens.Token]:
    """An empty token file."""
    found = tokens.token_file(tmp_path / "tokens.yaml")
    private_file.create(found.path, found.render({}))
    return found


@pytest.fixture(scope="session", params=_VERSIONS, ids=str)
def shop(request: pytest.FixtureRequest) -> Iterator[site.Shop]:
    """The shop, on the oldest and on the newest version."""
    with site.shop(request.param) as found:
        yield found


@pytest.fixture(scope="session")
def newest() -> Binaries:
    return _VERSIONS[-1]


@pytest.fixture(scope="session")
def newest_shop(newest: Binaries) -> Iterator[site.Shop]:
    """The shop on the newest version alone, for what does not depend on it."""
    with site.shop(newest) as found:
        yield found


@pytest.fixture(scope="session")
def lasting_shop(newest: Binaries) -> Iterator[site.Shop]:
    """The shop of servers that serve the tests of several files: what they leave open is not counted by a test that
    counts what its own server has left in `newest_shop`."""
    with site.shop(newest) as found:
        yield found


@pytest.fixture(scope="session", params=_VERSIONS, ids=str)
def login_shop(request: pytest.FixtureRequest) -> Iterator[site.Shop]:
    """The shop on clusters of their own, for login roles, which belong to a cluster: on TCP too, where pg_hba.conf
    keeps them out. Who uses it takes users of their own."""
    with site.shop(request.param, tcp=True) as found:
        site.keep_out(found.cluster)
        yield found


@pytest.fixture
def make_site(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., site.Site]]:
    made: list[site.Site] = []

    def make(shop: site.Shop, **options: str) -> site.Site:
        made.append(site.Site(tmp_path / f"site{len(made)}", shop, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for one in made:
        one.stop()
        if getattr(request.node, "failed", False):
            print("".join(one.stderr[-200:]))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome = yield
    if outcome.get_result().failed:  # type: ignore[attr-defined]
        item.failed = True  # type: ignore[attr-defined]


@dataclass
class Live:
    """A running server, for real clients."""

    url: str
    token: str
    config: Path
    ca: Path | None = None


@pytest.fixture(scope="session")
def live(lasting_shop: site.Shop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    found = site.Site(tmp_path_factory.mktemp("live") / "site", lasting_shop).start(anew=True)
    yield Live(found.url, found.token()[1], found.config)
    assert found.stop() in (0, -15)


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a throw-away CA: ca.pem, cert.pem and key.pem for localhost."""
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    issued = authority.issue_cert("localhost", "127.0.0.1")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    issued.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    issued.private_key_pem.write_to_path(folder / "key.pem")
    (folder / "key.pem").chmod(0o600)
    return folder


@pytest.fixture(scope="session")
def live_tls(lasting_shop: site.Shop, certificates: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    found = site.Site(tmp_path_factory.mktemp("live-tls") / "site", lasting_shop)
    found.start("--tls-cert", str(certificates / "cert.pem"), "--tls-key", str(certificates / "key.pem"), anew=True)
    yield Live(found.url, found.token()[1], found.config, certificates / "ca.pem")
    assert found.stop() in (0, -15)


@pytest.fixture(scope="session")
def mcpctl_command() -> list[str]:
    return [sys.executable, "-m", "mcpctl"]
