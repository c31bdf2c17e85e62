"""The check that a folder or a study is continued with the settings that it was started with."""

from run.cli import UserError

LONGEST = 100  # characters of a change that a message shows


def check_same_settings(previous: dict, current: dict, flag: str, what: str) -> None:
    """Raise UserError if `what` was started with other settings. The message names the first one that differs.

    previous, current: {name: value}; a name that only one of them has is not compared. flag: the flag with which the
    user can choose another folder or study.
    """
    for name, value in current.items():
        previous_value = previous.get(name, value)
        if previous_value != value:
            change = f"{name}: {previous_value}, now {value}"
            change = change if len(change) <= LONGEST else name
            raise UserError(f"{flag}: {what} was started with other settings ({change}); choose another {flag}")
