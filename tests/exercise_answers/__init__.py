"""Right and wrong answers to the exercises, one file a chapter; ``tests/test_exercises.py`` runs every one.

Each file defines ``RIGHT = {"topic.name": function}`` and ``WRONG = {"topic.name": [function, function, ...]}``.
"""
