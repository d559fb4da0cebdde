"""The exercises of the first chapter: no mathematics, three functions that a model is made around."""

import random

from tformer_lib.contract import counted
from tformer_lib.teaching.exercises.engine import exercise, require

WORDS = ("once", "lily", "ben", "had", "a", "red", "ball", "kite", "and", "said")


@exercise(
    "ten_minutes.likeliest",
    title="The likeliest next token",
    hints=(
        "You are looking for a key of the dictionary, and you compare its values.",
        "max() takes a function that says by what to compare: max(words, key=...).",
        "max(chances, key=chances.get)",
    ),
)
def check_likeliest(fn):
    draw = random.Random(0)
    for _ in range(20):
        words = draw.sample(WORDS, draw.randint(1, 6))
        shares = draw.sample(range(1, 20), len(words))  # in percent; they add up to less than 100, as some tokens' do
        chances = {word: share / 100 for word, share in zip(words, shares, strict=True)}
        before, found = dict(chances), fn(chances)
        best = words[shares.index(max(shares))]
        require(isinstance(found, str), f"return the token itself, a word; this is {found!r}")
        require(found in before, f"{found!r} is none of the tokens {words}")
        require(
            found == best, f"of {before}, {best!r} has the largest probability, and your function returns {found!r}"
        )
        require(chances == before, "your function changes the dictionary that it is given")


@exercise(
    "ten_minutes.write",
    title="Write, one token at a time",
    hints=(
        "Each turn asks next_token for one token, and the token becomes part of what the next turn reads.",
        "Copy the list first: text = list(text). Then append in a loop.",
        "for _ in range(count): text.append(next_token(text))",
    ),
)
def check_write(fn):
    for start, count in ((["once"], 3), (["a", "red"], 5), (["lily"], 0), (["said"], 1)):
        asked = []

        def next_token(text, asked=asked):
            asked.append(list(text))
            return f"{text[-1]}{len(text)}"

        given = list(start)
        found = fn(next_token, given, count)
        expected = list(start)
        for _ in range(count):
            expected.append(f"{expected[-1]}{len(expected)}")
        require(given == start, "your function changes the list that it is given; write into a copy")
        require(isinstance(found, list), f"return the list of all tokens, not {type(found).__name__}")
        require(found[: len(start)] == start, f"the text begins with {start}, and yours with {found[: len(start)]}")
        require(
            len(found) == len(start) + count,
            f"{counted(len(start), 'token')} and {count} new make {len(start) + count}; yours has {len(found)}",
        )
        require(
            found == expected,
            f"next_token must read everything that is written so far; it was asked about {asked}",
        )
        require(
            len(asked) == count, f"next_token was called {len(asked)} times for {count} tokens, and each call is a pass"
        )


@exercise(
    "ten_minutes.speaker",
    title="Be the head: who speaks?",
    hints=(
        "Walk back from the end of the story, and stop at the first word that is a name.",
        "reversed(words) walks from the end; `word in names` says whether a word is a name.",
        "return next((word for word in reversed(words) if word in names), None)",
    ),
)
def check_speaker(fn):
    names, others = {"Lily", "Ben", "Anna", "Tom"}, {"Sara", "Max"}
    stories = (
        ("Once Lily lived by the sea . I have lost my ball , said", "Lily"),
        ("Ben met Anna . Where is Tom , said", "Tom"),
        ("Anna had a kite . Ben took it . Give it back , said", "Ben"),
        ("Tom and Tom met Lily . Hello , said", "Lily"),
        ("The sea was green , said", None),
        ("Ben", "Ben"),
        ("", None),
    )
    cases = [(story, names, expected) for story, expected in stories]
    cases += [("Max had a boat . Sara liked Tom , said", others, "Sara"), ("Lily ran . Hello , said", others, None)]
    for story, known, expected in cases:
        found = fn(story.split(), set(known))
        told = f"in {story!r} the last name is {expected!r}" if expected else f"{story!r} holds no name: return None"
        told += "" if known is names else f", where the names are {sorted(known)}"
        require(found == expected, f"{told}, and your function returns {found!r}")
