"""Give a user an identity of an outside issuer, and take it away."""

from dataclasses import replace

from mcpctl.errors import ConflictError, NotFoundError
from mcpctl.identity import links, users
from mcpctl.identity.entry_file import EntryFile
from mcpctl.identity.links import Link
from mcpctl.identity.users import User


def link(file: EntryFile[User], name: str, wanted: Link) -> tuple[User, bool]:
    """Write it into the user's entry; (entry, whether that changed anything). ConflictError (exit 5) where it is
    another user's."""
    with file.edit() as entries:
        user = users.find(entries, name)
        owner = links.linked(entries).get((wanted.issuer, wanted.subject))
        if owner not in (None, name):
            hint = f"`mcpctl user unlink {owner}` takes it from them"
            raise ConflictError(f"{wanted.subject!r} of {wanted.issuer} is linked to {owner}", hint)
        if owner is None:
            user = entries[name] = replace(user, links=(*user.links, wanted))
    return user, owner is None


def unlink(file: EntryFile[User], name: str, gone: Link) -> User:
    """Take it out of the user's entry; NotFoundError (exit 4) where they have it not."""
    with file.edit(though_full=True) as entries:
        user = users.find(entries, name)
        if gone not in user.links:
            hint = f"`mcpctl user show {name}` shows what is"
            raise NotFoundError(f"{gone.subject!r} of {gone.issuer} is not linked to {name}", hint)
        user = entries[name] = replace(user, links=tuple(one for one in user.links if one != gone))
    return user
