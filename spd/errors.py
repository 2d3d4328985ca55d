"""The one error that is meant for a person: what was wrong, where, and what would work."""


class UserError(ValueError):
    """Something the user can mend. The runner prints it as a sentence, without a stack trace."""
