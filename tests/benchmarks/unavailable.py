"""The reason why a contender has no row in the benchmark; the report shows it in the row's place."""


class Unavailable(Exception):  # noqa: N818 (a finding, not an error)
    """A contender cannot run on a model or machine; the message says why, in one line."""
