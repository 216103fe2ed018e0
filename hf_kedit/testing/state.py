"""What a Hub on this machine holds: users, organisations, repositories and uploaded files. Knows no requests."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping

from .repos import HubFault, Repository

USER, ORGANISATION = "user", "org"


class HubState:
    """What the answers of a Hub are made of.

    Args:
        endpoint: the address that clients use.
        users: names; the first one is the default of `token`.
        orgs: organisation → the users in it. A namespace that is neither cannot be written to.
    """

    def __init__(self, endpoint: str, users: Collection[str], orgs: Mapping[str, Collection[str]] | None = None):
        self.endpoint = endpoint
        self.users = tuple(users)
        self.orgs = dict(orgs) if orgs is not None else {ORGANISATION: self.users}
        self.repos: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.Lock()

    def token(self, user: str | None = None) -> str:
        """The access token of a user."""
        return f"hf_{user or self.users[0]}"

    def owner_of(self, token: str) -> str:
        """The user whom a token belongs to.

        Raises:
            HubFault: if it is nobody's.
        """
        for user in self.users:
            if self.token(user) == token:
                return user
        raise HubFault(401, "Invalid credentials in Authorization header")

    def is_member(self, user: str | None, name: str) -> bool:
        """Whether a repository of this name is a user's own, or of an organisation that the user is in."""
        namespace = name.partition("/")[0]
        return user is not None and (user == namespace or user in self.orgs.get(namespace, ()))

    def reset(self) -> None:
        """Forget all repositories and requests."""
        with self.lock:
            self.repos.clear()
            self.objects.clear()
            self.requests.clear()
