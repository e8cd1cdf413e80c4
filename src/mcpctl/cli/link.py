"""mcpctl user link, unlink: which identities of an outside issuer are a user's."""

from typing import TYPE_CHECKING, Annotated

import typer

from mcpctl.cli import guest, output, user
from mcpctl.cli.common import (
    ConfigOption,
    JsonOption,
    ReasonOption,
    by_whom,
    note,
    proof_of_user,
    ready_to_note,
    settings,
)

if TYPE_CHECKING:
    from mcpctl.config_keys import Settings
    from mcpctl.identity.links import Link

IssuerOption = Annotated[
    str | None, typer.Option("--issuer", metavar="I", help="The issuer's name in auth.oidc, or its URL to the letter.")
]
SubjectOption = Annotated[
    str | None,
    typer.Option("--subject", metavar="S", help="Who they are there: `sub` in their tokens, or what user_claim says."),
]


@user.app.command("link")
def link(
    context: typer.Context,
    name: user.Name,
    issuer: IssuerOption = None,
    subject: SubjectOption = None,
    guest_: Annotated[
        str | None,
        typer.Option("--guest", metavar="G", help="A guest of `mcpctl user list`, instead of issuer and subject."),
    ] = None,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Say that an identity of an outside issuer is this user: its tokens are then theirs.

    An identity is the issuer and its subject there, which never change hands; a name or an e-mail address can.

    Example: mcpctl user link alice --issuer keycloak --subject 8c1f6f0e-7f7b-4d0c-9a53-6a8a2c1f3b11
    """
    from mcpctl.errors import NotFoundError, UsageError
    from mcpctl.identity import linking, users

    found = settings(context, config)
    if guest_ is not None:
        if issuer is not None or subject is not None:
            raise UsageError("--guest says issuer and subject already", "leave them out")
        one = guest.find(found, guest_)
        issuer, subject = one.issuer, one.subject
    wanted = _link(found, issuer, subject)
    if wanted.issuer not in _issuers(found).values():
        known = ", ".join(found.auth.oidc) or "none"
        hint = f"there are: {known}; docs/identity-provider.md adds one"
        raise NotFoundError(f"auth.oidc has no issuer {wanted.issuer}", hint)
    ready_to_note(found)
    entry, changed = linking.link(users.user_file(found.auth.user_file), name, wanted)
    if changed:
        note(found, "user.linked", user=name, reason=by_whom(context, _told(wanted)))
    _put(name, wanted, "linked", json, changed=changed)
    if entry.disabled_at is not None:
        output.warn(f"{name} is disabled: their tokens open nothing", f"mcpctl user enable {name}")


@user.app.command("unlink")
def unlink(
    context: typer.Context,
    name: user.Name,
    issuer: IssuerOption = None,
    subject: SubjectOption = None,
    reason: ReasonOption = None,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Take an identity of an outside issuer from this user, and cut what its tokens have running. Never asks."""
    from mcpctl.identity import linking, users

    found = settings(context, config, needs_log=False)
    gone = _link(found, issuer, subject)
    linking.unlink(users.user_file(found.auth.user_file), name, gone)
    note(found, "user.unlinked", user=name, reason=by_whom(context, f"{_told(gone)}{f'; {reason}' if reason else ''}"))
    words, values = proof_of_user(found, name)
    _put(name, gone, "unlinked", json, cut=values)
    if not json:
        output.put(words)


def _issuers(found: "Settings") -> dict[str, str]:
    return {name: one.issuer or "" for name, one in found.auth.oidc.items()}


def _link(found: "Settings", issuer: str | None, subject: str | None) -> "Link":
    from mcpctl.errors import UsageError
    from mcpctl.identity.links import link_of

    if issuer is None or subject is None:
        hint = "both stand in its tokens: iss and sub; `mcpctl user link` takes --guest instead"
        raise UsageError("an identity is --issuer and --subject together", hint)
    if "://" not in issuer and issuer not in found.auth.oidc:
        from mcpctl.errors import NotFoundError

        known = ", ".join(found.auth.oidc) or "none"
        hint = f"there are: {known}; docs/identity-provider.md adds one"
        raise NotFoundError(f"auth.oidc has no issuer {issuer}", hint)
    try:
        return link_of(_issuers(found).get(issuer, issuer), subject)
    except ValueError as problem:
        raise UsageError(f"--{problem}", "both are as they stand in the tokens") from None


def _told(link: "Link") -> str:
    return f"{link.subject} of {link.issuer}"


def _put(name: str, link: "Link", word: str, json: bool, **more: object) -> None:
    if json:
        output.put_json({"user": name, "issuer": link.issuer, "subject": link.subject, **more})
    else:
        already = (
            "was linked already to" if more.get("changed") is False else f"{word} {'from' if word[0] == 'u' else 'to'}"
        )
        output.put(f"{_told(link)} {already} {name}")
