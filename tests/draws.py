"""How many examples a property test draws: its own number in an ordinary run, 100 times as many in the deep one."""

from hypothesis import HealthCheck, settings

ORDINARY = 100
"""What hypothesis draws where nobody says more: a profile that draws n times as many multiplies every test's number."""


def register_profiles() -> None:
    """Let ``HYPOTHESIS_PROFILE`` (or ``--hypothesis-profile``) choose ``deep``, which is for a release.

    Neither has a deadline, which a busy machine would miss, and neither draws the same examples each time, as
    hypothesis would do by itself where the variable CI is set.
    """
    settings.register_profile("ordinary", deadline=None, derandomize=False, print_blob=True)
    slow = [HealthCheck.too_slow]
    settings.register_profile(
        "deep", settings.get_profile("ordinary"), max_examples=100 * ORDINARY, suppress_health_check=slow
    )


def draws(count: int, **options) -> settings:
    """The settings of a test that draws ``count`` examples in an ordinary run, however slow the machine is."""
    return settings(max_examples=count * settings().max_examples // ORDINARY, **options)


def is_deep() -> bool:
    """Whether what an ordinary run samples is to be tried in full."""
    return settings().max_examples > ORDINARY
