"""As in Ray."""


class RayActorError(Exception):
    """An actor is gone."""


class GetTimeoutError(Exception):
    """Nothing came in time."""
