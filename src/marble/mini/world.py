"""The miniature world: what can be said about a picture, and what its captions are.

A `World` holds every choice that another world could make differently: shapes, palette, alphabet,
words, places. A `Spec` is what one caption fixes; what it leaves open (where things stand, how large,
before which backdrop) is the renderer's to vary, and is where diversity lives.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

RGB = tuple[int, int, int]

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
"""The relations that there are, each with its opposite. How a caption says them is up to the grammar."""


@dataclass(frozen=True)
class Grammar:
    """How captions are put: templates, and the words for what every world has."""

    place: str = "a {place} at {time}"
    extra: str = " with {extra}"
    word: str = 'the word "{word}" in {colour}'
    count: str = "{number} {colour} {shape}s"
    thing: str = "a {colour} {shape}"
    sized_thing: str = "a {size} {colour} {shape}"
    position: str = "{one} {relation} {two}"
    relations: tuple[tuple[str, str], ...] = tuple((name, name) for name in OPPOSITE)  # (relation, words for it)
    counts: tuple[tuple[str, int], ...] = (("two", 2), ("three", 3), ("four", 4))
    sizes: tuple[tuple[str, str], ...] = (("small", "small"), ("large", "large"))  # (size, word for it)
    glue: tuple[str, ...] = ("a", "the", "word", "in", "at", "with", "left", "right", "of", "above", "below")
    """Every fixed word of the templates and relations, in the order in which the tokenizer numbers them."""


@dataclass(frozen=True)
class Thing:
    """An object as a caption names it."""

    colour: str
    shape: str
    size: str = ""  # "", "small" or "large"


@dataclass(frozen=True)
class Spec:
    """What a caption fixes. `kind` says which of the other fields are used."""

    kind: str
    things: tuple[Thing, ...] = ()  # one entry per object to draw
    relation: str = ""  # of the first thing to the second
    word: str = ""
    colour: str = ""  # of the word
    place: str = ""
    time: str = ""
    extra: str = ""


@dataclass(frozen=True)
class World:
    """All parameters of one world. Frozen with `version`: a change is a new version, its numbers made again."""

    name: str
    version: int
    shapes: tuple[str, ...]
    palette: dict[str, RGB] = field(hash=False)
    backdrops: tuple[tuple[RGB, RGB], ...]  # muted (top, bottom) colours behind objects and words
    letters: str
    words: tuple[str, ...]
    held_out_words: tuple[str, ...]
    places: tuple[str, ...]
    times: tuple[str, ...]
    extras: tuple[str, ...]
    grammar: Grammar = Grammar()
    size: int = 64  # pixels, both ways
    letter_scale: int = 3  # pixels per dot of the 5×7 font
    letter_gap: int = 3  # pixels between letters

    @property
    def word_length(self) -> int:
        """Letters per word; every word of a world has the same."""
        return len(self.words[0])

    @property
    def letter_pitch(self) -> int:
        """Pixels from the left edge of a letter to that of the next."""
        return 5 * self.letter_scale + self.letter_gap

    @property
    def revision(self) -> str:
        """Name and version, as written beside every number that was made with this world."""
        return f"{self.name} {self.version}"

    def caption(self, spec: Spec) -> str:
        """The caption of `spec` in this world's grammar."""
        grammar = self.grammar
        if spec.kind == "place":
            tail = grammar.extra.format(extra=spec.extra) if spec.extra else ""
            return grammar.place.format(place=spec.place, time=spec.time) + tail
        if spec.kind == "word":
            return grammar.word.format(word=spec.word, colour=spec.colour)
        if spec.kind == "count":
            number = {value: name for name, value in grammar.counts}.get(len(spec.things), str(len(spec.things)))
            return grammar.count.format(number=number, colour=spec.things[0].colour, shape=spec.things[0].shape)
        named = [self._name(thing) for thing in spec.things]
        if not spec.relation:
            return named[0]
        relation = dict(grammar.relations)[spec.relation]
        return grammar.position.format(one=named[0], relation=relation, two=named[1])

    def _name(self, thing: Thing) -> str:
        if not thing.size:
            return self.grammar.thing.format(colour=thing.colour, shape=thing.shape)
        size = dict(self.grammar.sizes)[thing.size]
        return self.grammar.sized_thing.format(size=size, colour=thing.colour, shape=thing.shape)

    @cached_property
    def grammar_words(self) -> tuple[str, ...]:
        """Every word that a caption can contain, the words to render left out: the tokenizer's whole tokens."""
        plurals = [shape + "s" for shape in self.shapes]
        sizes, counts = [word for _, word in self.grammar.sizes], [word for word, _ in self.grammar.counts]
        pools = (
            self.grammar.glue,
            sizes,
            counts,
            self.palette,
            self.shapes,
            plurals,
            self.places,
            self.times,
            self.extras,
        )
        return tuple(dict.fromkeys(itertools.chain.from_iterable(pools)))

    @cached_property
    def pools(self) -> dict[str, list[Spec]]:
        """Every spec that there is, by kind, in a fixed order; words for training only."""
        return {
            "place": self.place_specs(),
            "attribute": self.attribute_specs(),
            "position": self.position_specs(),
            "count": self.count_specs(),
            "word": self.word_specs(),
        }

    # ---- the prompts that there are, in a fixed order -------------------------------------------------

    def place_specs(self) -> list[Spec]:
        """Every plain scene."""
        return [
            Spec("place", place=p, time=t, extra=e)
            for p, t, e in itertools.product(self.places, self.times, ("", *self.extras))
        ]

    def attribute_specs(self) -> list[Spec]:
        """Every single object, with and without a size."""
        pool = itertools.product(("", *dict(self.grammar.sizes)), self.palette, self.shapes)
        return [Spec("attribute", (Thing(c, s, size),)) for size, c, s in pool]

    def count_specs(self) -> list[Spec]:
        """Two to four alike objects."""
        pool = itertools.product(dict(self.grammar.counts).values(), self.palette, self.shapes)
        return [Spec("count", (Thing(c, s),) * n) for n, c, s in pool]

    def position_specs(self) -> list[Spec]:
        """Two objects that differ in colour and shape, in every relation."""
        kinds = list(itertools.product(self.palette, self.shapes))
        pairs = [(a, b) for a, b in itertools.permutations(kinds, 2) if a[0] != b[0] and a[1] != b[1]]
        return [Spec("position", (Thing(*a), Thing(*b)), relation=r) for a, b in pairs for r in OPPOSITE]

    def word_specs(self, words: tuple[str, ...] | None = None) -> list[Spec]:
        """The given words (those for training, if none are given) in every colour."""
        pool = itertools.product(self.words if words is None else words, self.palette)
        return [Spec("word", word=w, colour=c) for w, c in pool]

    # ---- near misses ----------------------------------------------------------------------------------

    def confuse(self, spec: Spec, rng: np.random.Generator) -> Spec:
        """A spec one mistake away from `spec`: another colour, shape, count, side, letter, place or time."""

        def other(pool: tuple[str, ...], but: str) -> str:
            rest = [item for item in pool if item != but]
            return rest[rng.integers(len(rest))]

        colours = tuple(self.palette)
        if spec.kind == "place":
            part = rng.choice(["place", "time", "extra"])
            if part == "place":
                return replace(spec, place=other(self.places, spec.place))
            if part == "time":
                return replace(spec, time=other(self.times, spec.time))
            return replace(spec, extra=other(("", *self.extras), spec.extra))
        if spec.kind == "word":
            if rng.random() < 0.2:
                return replace(spec, colour=other(colours, spec.colour))
            at = int(rng.integers(len(spec.word)))
            letter = other(tuple(self.letters), spec.word[at])
            return replace(spec, word=spec.word[:at] + letter + spec.word[at + 1 :])
        if spec.kind == "count" and rng.random() < 0.5:
            wrong = int(rng.choice([n for n in range(1, 6) if abs(n - len(spec.things)) == 1]))
            return replace(spec, things=(spec.things[0],) * wrong)
        if spec.kind == "position" and rng.random() < 0.5:
            return replace(spec, relation=OPPOSITE[spec.relation])
        things = list(spec.things)
        which = range(len(things)) if spec.kind == "count" else [int(rng.integers(len(things)))]
        old = things[which[0]]
        if rng.random() < 0.5:
            new = replace(old, colour=other(colours, old.colour))
        else:
            new = replace(old, shape=other(self.shapes, old.shape))
        for at in which:
            things[at] = new
        return replace(spec, things=tuple(things))


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


MINI = World(
    name="mini",
    version=1,
    shapes=("circle", "square", "triangle", "cross"),
    palette={
        "red": (214, 45, 45),
        "yellow": (245, 205, 50),
        "green": (45, 165, 75),
        "blue": (50, 90, 215),
        "purple": (150, 65, 185),
        "white": (245, 245, 240),
    },
    backdrops=(
        ((96, 104, 118), (128, 134, 142)),
        ((132, 118, 104), (108, 98, 92)),
        ((88, 106, 104), (122, 134, 126)),
        ((120, 106, 116), (92, 88, 102)),
        ((76, 80, 92), (112, 110, 112)),
    ),
    letters="ACEHILNOPT",
    words=_words("CAT HAT TEA PIT PIE ICE OIL LIP TOP POT CAP TAP NAP LAP HIP HOT LOT ACE APE EAT TIE TOE HIT ACT"),
    held_out_words=_words("CAN PAN LIT NOT TIP COT PAL NIL OAT HOP TAN COP"),
    places=("beach", "desert", "forest", "mountain", "meadow", "city"),
    times=("noon", "sunset", "night"),
    extras=("clouds", "birds"),
)
"""The world of the shipped model."""

MINI_B = World(
    name="mini-b",
    version=1,
    shapes=("diamond", "ring", "heart", "bow"),
    palette={
        "orange": (242, 128, 34),
        "pink": (238, 105, 170),
        "teal": (20, 160, 165),
        "lime": (150, 215, 45),
        "indigo": (70, 50, 160),
        "black": (20, 20, 24),
    },
    backdrops=(
        ((200, 196, 188), (222, 218, 210)),
        ((188, 198, 206), (214, 220, 226)),
        ((206, 198, 184), (186, 180, 170)),
        ((196, 204, 192), (218, 222, 212)),
        ((204, 194, 200), (182, 176, 184)),
    ),
    letters="BDGKMRSUWY",
    words=_words("BUD BUG BUS BUY DUB DUG DRY GUM GUY GYM MUD MUG RUB RUG RUM SKY SUB SUM WRY YUM YUK BRU SUK KYU"),
    held_out_words=_words("DUD BUM MUM DUM SUD URB URD WUD MUS SUS GUS RYU"),
    places=("lake", "volcano", "farm", "island", "canyon", "glacier"),
    times=("dawn", "midday", "dusk"),
    extras=("kites", "rain"),
    grammar=Grammar(
        place="one {place} near {time}",
        extra=" and {extra}",
        word='some sign saying "{word}" painted {colour}',
        thing="one {colour} {shape}",
        sized_thing="one {size} {colour} {shape}",
        relations=(("left of", "left of"), ("right of", "right of"), ("above", "over"), ("below", "under")),
        sizes=(("small", "tiny"), ("large", "huge")),
        glue=("one", "some", "sign", "saying", "painted", "near", "and", "left", "right", "of", "over", "under"),
    ),
)
"""A second world with nothing to draw in common, on which nothing is ever tuned."""

WORLDS = {world.name: world for world in (MINI, MINI_B)}
"""Every world by name."""
