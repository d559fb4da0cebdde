"""Exercises with checks that explain: ``check("masks.causal", my_function)`` and ``hint("masks.causal")``.

A chapter's checks are imported when one of them is first called by name; nothing of a chapter is needed before.
"""

from tformer_lib.teaching.exercises.engine import check, hand_in, hint, progress

__all__ = ["check", "hand_in", "hint", "progress"]
