"""The one exception that means: what the user gave cannot be used."""


class InputError(ValueError):
    """Bad input, in one line: what was given, where, what is allowed, what to do.

    The command line prints it as `dpo: error: <message>` and exits with code 2.
    """
