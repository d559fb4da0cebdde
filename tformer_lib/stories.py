"""Small English stories from a probabilistic grammar, so that their entropy is known exactly.

The grammar below is all there is. A line ``rule: a | b*3`` lists the ways to write a rule and their weights (1 if none
is given); an indented line goes on with the line before. In a way to write a rule,

- ``<rule>`` is replaced by one of the rule's ways, drawn at random;
- ``<hero=rule>`` does the same and remembers the words as ``hero``;
- ``{hero:Tom}`` remembers ``Tom`` and writes nothing;
- ``{hero}`` writes what is remembered, ``{He}`` writes what ``he`` remembers with a capital.

Every draw is independent of the draws before it, and a story can be drawn in one way only (a test parses stories to see
it). So ``log p(story)`` is the sum of the log-probabilities of its draws, and the entropy of a story follows from the
grammar by recursion, with no sampling:

    H(rule) = sum over ways w of p(w) * (-log p(w) + sum of H(r) over the rules r that w writes)

What is remembered costs nothing to write again, for a reader who has read what came before. A model that attends to the
earlier words can know it too; a model that cannot pays for it every time.
"""

import math
import random
import re
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

GRAMMAR = """
story: <open> <lost> <close>*3 | <open> <picnic> <close>*2 | <open> <pond> <close>*2 | <open> <swap> <close>*2 |
    <open> <race> <close>*2

open: <when> <hero> lived in a <size> <home> <near>. <trait>
when: Once upon a time,*3 | Long ago, | Once,*2 | In a land far away,
hero: {he:she}{him:her}{his:her}<hero=girl> | {he:he}{him:him}{his:his}<hero=boy>
girl: Anna*4 | Bella*3 | Clara*3 | Daisy*2 | Ella*2 | Flora | Grace*2 | Hazel | Ivy | Lily*4 | Maya*3 | Nora*2 |
    Rosa*2 | Sara*3 | Tess | Zoe
boy: Adam*2 | Ben*4 | Carl | Dan*2 | Eli | Finn*3 | Hugo | Jack*4 | Leo*3 | Max*3 | Noah*2 | Oscar | Paul |
    Sam*4 | Theo | Tom*4
size: little*4 | tiny*2 | tall | crooked | cosy*2 | round
home: house*4 | cottage*3 | cabin*2 | tower | mill | tent
near: by the sea*3 | near the forest*3 | on a green hill*2 | at the edge of the village*2 | beside a river*2 |
    under a mountain
trait: {He} was a very <quality> <child> who liked to <hobby>.*2 | {He} was <quality>, and {he} loved to
    <hobby>. | Every day {he} liked to <hobby>.
quality: kind*3 | brave*2 | curious*3 | cheerful*2 | clever*2 | quiet | gentle | patient
child: child*3 | dreamer | friend
hobby: sing*3 | paint*2 | climb trees*2 | read old books*2 | dance in the rain | look at the stars*2 | dig for
    treasure | bake bread | fly kites | tell jokes

time: One <weather> <part>,*4 | One day,*2 | The next <part>,
weather: sunny*4 | windy*2 | rainy*2 | cold*2 | foggy | snowy | warm*2
part: morning*4 | afternoon*3 | evening*2
colour: red*4 | blue*4 | green*3 | yellow*3 | white*2 | black*2 | purple | golden | silver | pink*2
toy: ball*4 | kite*3 | drum*2 | boat*2 | hat*2 | scarf*2 | lantern | bell*2 | whistle | marble | ribbon | key*2
    | button
place: beach*2 | market*3 | forest*3 | park*4 | meadow*2 | library | old barn | castle | orchard | harbour
pet: <mood> <animal=animal> called <friend=friend>
mood: friendly*3 | sleepy*2 | fluffy*2 | tiny*2 | wise*2 | shy*2 | proud | hungry*2 | grumpy
animal: rabbit*4 | fox*3 | owl*3 | mouse*3 | hedgehog*2 | squirrel*2 | badger*2 | frog*2 | duck*3 | crow | goat
    | bear*2 | cat*4 | dog*4
friend: Pip*4 | Biscuit*2 | Clover*2 | Dot*2 | Fern*2 | Mossy*2 | Nutmeg*2 | Pepper*3 | Rusty*3 | Shadow*2 |
    Tansy | Waffles | Bramble*2 | Juniper
Someone: {friend}*2 | The {animal}
someone: {friend}*2 | the {animal}

lost: {He} had a <colour=colour> <toy=toy>, and {he} took it everywhere. <time> {hero} went to the
    <place=place>, but when {he} came home the {toy} was gone. <sad> On the path {he} met a <pet>. <ask> "I have
    lost my {colour} {toy}," said {hero}. <offer> <search> There was the {colour} {toy}! {hero} <thank>
    {friend}. That <night=night>, {hero} told {his} <family=family> how {friend} the {animal} had found the
    {toy} {hide}.
sad: {hero} sat down and cried.*3 | {hero} was very sad.*3 | {hero} looked in every pocket twice. | "Oh no!"
    said {hero}.*2
ask: "Why are you <feel>?" asked <someone>.*3 | "What is the matter?" asked <someone>.*2 | <Someone> looked at
    {him} for a while.
feel: so sad*2 | crying*2 | so quiet | all alone
offer: "Then let us look for it together," said {friend}.*2 | "I will help you," said {friend}.*3 | "Two can
    look better than one," said {friend}.
search: They looked <wrong>, but found only <junk>. Then they looked <hide=hide>.*3 | They looked <wrong>, but
    found only <junk>. They looked <wrong>, but found only <junk>. Then they looked <hide=hide>.*2 | They went
    back to the {place} and looked <hide=hide>.*2
wrong: in the long grass*2 | behind the bakery*2 | up in a tree | down the well | in the mud | inside an empty
    barrel
junk: an old shoe*3 | a broken cup*2 | three snails*2 | a wet leaf*2 | a coin | some feathers
hide: under the bridge*3 | behind a big rock*3 | in a bird nest*2 | between two roots*2 | on top of a fence |
    under a wooden bench*2 | in a pile of leaves*2
night: night*3 | evening
family: mother*4 | father*4 | sister*2 | brother*2 | grandmother*2 | grandfather | aunt | uncle

picnic: <time> {hero} asked {his} friends to a picnic <spot>. {hero} brought <fruit=fruit>. A <pet> brought
    <cake=cake>. A <mood> <second=bird> brought <drink=drink>. But then <trouble>. <Someone> <react>. "Do not
    worry," said {hero}. "We still have <saved=saved>." So they sat <shelter> and shared {saved}. "The {cake}
    <taste>," said the {second}. "And I liked the {fruit} best," said {friend}.
spot: on the hill*2 | by the lake*3 | in the garden*2 | under the old oak*2
fruit: plums*2 | apples*4 | cherries*2 | pears*2 | grapes*2 | berries*3 | peaches
cake: honey cake*3 | warm bread*2 | cheese pie*2 | nut cookies*3 | carrot muffins*2 | soft pancakes
bird: swan | robin*3 | goose*2 | sparrow*2 | parrot | heron | pigeon*2
drink: milk*3 | cold tea*2 | lemonade*3 | cider | hot cocoa*2
trouble: it began to rain*3 | the wind blew the blanket away*2 | a cloud hid the sun*2 | ants came from
    everywhere
react: sighed*2 | began to cry*2 | looked up at the sky | ran in circles
saved: the {fruit} and the {cake}*2 | the {cake} and the {drink}*2 | the {fruit} and the {drink}
shelter: under a big leaf*2 | in a hollow tree*2 | on the kitchen floor | close together*2
taste: tasted like summer*2 | made me happy*2 | was worth the walk

pond: <time> {hero} walked to the pond with {his} <family=family>. <count> <colour=colour> <swimmer=swimmer>
    were swimming there. "Look, {number}!" said {hero}. Then one more came out of the <reeds>. Now there were
    {more} {colour} {swimmer}. "<guess>?" asked the {family}. {hero} <think>. Then {he} threw <crumbs>, and all
    {more} of them <came>. <leave> Only {number} were left. "Where did it go?" asked the {family}. "There," said
    {hero}, and pointed at <where=where>. A {colour} shape <doing> by {where}. That night {hero} drew all {more}
    {swimmer} in {colour}.
count: {number:two}{more:three}Two*3 | {number:three}{more:four}Three*3 | {number:four}{more:five}Four*2 |
    {number:five}{more:six}Five*2 | {number:six}{more:seven}Six | {number:seven}{more:eight}Seven |
    {number:eight}{more:nine}Eight
swimmer: ducks*4 | fish*3 | swans*2 | frogs*3 | turtles*2 | geese | newts
reeds: reeds*3 | shadows*2 | tall grass*2 | deep water
guess: How many are there now*3 | Can you count them*2 | Is that all of them
think: counted on {his} fingers*2 | thought hard*2 | smiled*2 | took a deep breath
crumbs: some crumbs*3 | a little bread*2 | a handful of seeds*2
came: came closer*3 | splashed*2 | ate and ate*2 | made a great noise
leave: Soon one was tired and went away.*2 | One of them had eaten enough and left.*2 | After a while one was
    gone.
where: the far shore*2 | a flat stone*2 | the little island*2 | the lily leaves

swap: <time> {hero} wanted to give {his} <family=family> a present, but {he} had only a <colour=colour>
    <toy=toy>. {He} gave the {toy} to the <first=trade>, who gave {him} <fruit=fruit>. Then {he} met a <pet>.
    <Someone> <want> the {fruit}, so {hero} gave them away for a <gift=gift>. "What a <fine> {gift}!" said the
    {family}. "Where did you get it?" "From {friend} the {animal}," said {hero}, "who has my {fruit} now." And
    the {first} <still> with the {colour} {toy}.
trade: baker*4 | miller*2 | farmer*3 | sailor*2 | tailor*2 | doctor | king | gardener*2 | painter
want: wanted*3 | could smell*2 | dreamed of | asked for*2
gift: music box*2 | candle*2 | feather pen | warm blanket*3 | glass bird*2 | story book*3 | straw basket
fine: fine*2 | lovely*3 | beautiful*3 | strange
still: still plays*2 | sleeps every night | is very happy*2

race: <time> there was a race to the <place=place>. {hero} came to watch with {his} <family=family>. The
    <fast=fast> was quick, but the <slow=slow> never stopped. <cheer> At the <mark>, <event> <prize> "I knew
    it," said {hero}. "The {winner} <why>." The {loser} <shake> the {winner} and <talk>.
fast: hare*4 | pony*2 | deer*2 | hound*2 | stork | weasel
slow: tortoise*4 | snail*3 | donkey*2 | beetle*2 | cow | worm
cheer: Everybody cheered for the <cheered>.*2 | "Run!" called {hero}.*2 | Nobody made a sound.
cheered: {fast}*2 | {slow}
mark: bridge*2 | last tree*2 | white gate*2 | corner
event: the <loser=hare> <stopped>, and the <winner=tortoise> won.*3 | the <winner=hare> jumped ahead, and the
    <loser=tortoise> came second.*2
hare: {fast}
tortoise: {slow}
stopped: stopped to sleep*3 | took the wrong road*2 | began to boast*2 | tripped over a root*2
prize: The {winner} got a <colour=colour> <cup>, and the {loser} got <fruit=fruit>.*2 | The prize was a
    <colour=colour> <cup>.
cup: cup*3 | crown*2 | medal*2 | flag
why: wanted it more*2 | believed it could*2 | did not look back*2
shake: bowed to*2 | hugged*2 | shook hands with*2
talk: they stayed friends*2 | asked to race again*2 | laughed about it

close: {hero} <went>, <happy>.*4 | And {hero} <never>.*2 | It had been a <good> day for {hero}.*3
went: went home*3 | fell asleep*3 | waved goodbye*2 | walked back in the moonlight
happy: tired but happy*3 | smiling*2 | humming a song*2 | dreaming of tomorrow*2
never: never forgot that day*2 | told the story for years | was happy ever after*2 | still laughs about it
good: good*3 | long*2 | wonderful*2 | strange
thank: thanked*3 | hugged*3 | danced with | smiled at*2
doing: was asleep*3 | was resting*2 | sat in the sun
"""

PIECES = re.compile(r"<(?:(?P<slot>\w+)=)?(?P<rule>\w+)>|{(?P<name>\w+)(?::(?P<value>[^}]*))?}|(?P<words>[^<{]+)")


class Piece(NamedTuple):
    """A piece of a way to write a rule; the fields that do not apply are None."""

    slot: str | None
    rule: str | None
    name: str | None
    value: str | None
    words: str | None

    def recall(self, memory: dict[str, str]) -> str:
        """What this piece writes without a draw: its own words, or the words remembered under its name."""
        if self.words is not None:
            return self.words
        return memory[self.name] if self.name in memory else capitalised(memory[self.name.lower()])


class Way(NamedTuple):
    """One way to write a rule."""

    probability: float
    pieces: tuple[Piece, ...]


def capitalised(words: str) -> str:
    """``words`` with a capital first letter and the rest as it was."""
    return words[:1].upper() + words[1:]


@cache
def rules() -> dict[str, tuple[Way, ...]]:
    """The grammar, read: the ways to write each rule."""
    lines = GRAMMAR.strip().replace("\n    ", " ").splitlines()
    return {rule: read_ways(ways) for rule, ways in (line.split(": ", 1) for line in lines if line)}


def read_ways(text: str) -> tuple[Way, ...]:
    """Read ``a | b*3`` as two ways of probability 1/4 and 3/4."""
    matches = [re.fullmatch(r"(.*?)(?:\*(\d+))?", way.strip()) for way in text.split(" | ")]
    weights = [int(match[2] or 1) for match in matches]
    return tuple(
        Way(weight / sum(weights), tuple(Piece(**found.groupdict()) for found in PIECES.finditer(match[1])))
        for weight, match in zip(weights, matches, strict=True)
    )


def entropy(rule: str = "story") -> float:
    """The exact entropy of what ``rule`` writes, in nats: by recursion over the grammar, with no sampling."""
    return sum(
        way.probability * (-math.log(way.probability) + sum(entropy(piece.rule) for piece in way.pieces if piece.rule))
        for way in rules()[rule]
    )


def tell(draw: random.Random) -> tuple[str, float]:
    """Draw one story; returns its text and its log-probability in nats."""
    return write("story", draw, {})


def write(rule: str, draw: random.Random, memory: dict[str, str]) -> tuple[str, float]:
    """Draw one way to write ``rule``; returns the words and the log-probability of every draw in them."""
    way = pick(rules()[rule], draw.random())
    words, log_p = [], math.log(way.probability)
    for piece in way.pieces:
        if piece.rule:
            written, inner = write(piece.rule, draw, memory)
            log_p += inner
            words.append(written)
            if piece.slot:
                memory[piece.slot] = written
        elif piece.value is not None:
            memory[piece.name] = piece.value
        else:
            words.append(piece.recall(memory))
    return "".join(words), log_p


def pick(ways: tuple[Way, ...], u: float) -> Way:
    """The way that a uniform draw ``u`` in [0, 1) falls on."""
    for way in ways[:-1]:
        u -= way.probability
        if u < 0:
            return way
    return ways[-1]


def stories(count: int, seed: int | str = 0) -> list[str]:
    """``count`` stories, the same for the same seed on every machine."""
    if count < 0:
        raise ValueError(f"count must not be negative, got {count}")
    draw = random.Random(seed)
    return [tell(draw)[0] for _ in range(count)]


def log_prob(text: str) -> float:
    """The log-probability in nats of ``text`` being the next story; -inf where the grammar cannot write it."""
    return max((log_p for end, log_p, _ in parses("story", text, 0, {}) if end == len(text)), default=-math.inf)


def prefix_log_prob(text: str) -> float:
    """The log-probability in nats that the next story begins with ``text``."""
    return log_of_sum([log_p for _, log_p, _ in parses("story", text, 0, {}, prefix=True)])


def log_of_sum(log_ps: list[float]) -> float:
    """log(sum(exp(log_p))), without underflow."""
    top = max(log_ps, default=-math.inf)
    return top + math.log(math.fsum(math.exp(log_p - top) for log_p in log_ps)) if log_ps else top


def surprises(story: str) -> list[tuple[str, float]]:
    """Each word of a story with its exact -log p in nats, given all the words before it. They sum to that of the story.

    A word has the space after it, as the end of a word is news too.
    """
    words = re.findall(r"\S+ ?", story)
    log_ps = [prefix_log_prob("".join(words[:count])) for count in range(len(words))] + [log_prob(story)]
    return [(word, before - after) for word, before, after in zip(words, log_ps, log_ps[1:], strict=False)]


Parse = tuple[int, float, dict[str, str]]


def parses(rule: str, text: str, start: int, memory: dict[str, str], prefix: bool = False) -> Iterator[Parse]:
    """The ways in which ``rule`` writes the text from ``start``: where each ends, its log-probability, the memory.

    With ``prefix`` the text may end before the rule does, and what the rule would write beyond it is left open.
    """
    if prefix and start == len(text):
        yield start, 0.0, memory
        return
    for way in rules()[rule]:
        for end, log_p, after in follow(way.pieces, text, start, memory, prefix):
            yield end, log_p + math.log(way.probability), after


def follow(
    pieces: tuple[Piece, ...], text: str, start: int, memory: dict[str, str], prefix: bool = False
) -> Iterator[Parse]:
    """``parses`` for the pieces of one way, first to last."""
    if not pieces or (prefix and start == len(text)):
        yield start, 0.0, memory
        return
    piece, rest = pieces[0], pieces[1:]
    if piece.rule:
        for end, log_p, after in parses(piece.rule, text, start, memory, prefix):
            after = after | {piece.slot: text[start:end]} if piece.slot else after
            for last, more, final in follow(rest, text, end, after, prefix):
                yield last, log_p + more, final
    elif piece.value is not None:
        yield from follow(rest, text, start, memory | {piece.name: piece.value}, prefix)
    else:
        words = piece.recall(memory)
        if text.startswith(words, start):
            yield from follow(rest, text, start + len(words), memory, prefix)
        elif prefix and words.startswith(text[start:]):
            yield len(text), 0.0, memory
