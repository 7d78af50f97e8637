"""Prompts that ask for a text in the picture: everyday scenes times words and phrases, all of our own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from marble.errors import MarbleError
from marble.prompts.record import Record

SCENES_A_TEXT = {"train": 8, "held-out": 4}
"""Records of each text, in as many scenes."""
_HELD_OUT = 5  # one text in so many

_SCENES = """
A neon sign above a diner that says {}
A wooden shop sign hanging over a cobbled street, reading {}
A chalkboard outside a small cafe with {} written on it
A birthday cake with {} piped in icing
A vintage travel poster with the title {}
A road sign beside an empty desert highway that says {}
A white T-shirt on a clothes line, printed with {}
A coffee mug on a desk with the text {}
A hardcover book on a nightstand titled {}
A billboard over a busy crossing at dusk that reads {}
A brick wall with {} sprayed on it in bright colours
A hand-painted banner across a market square saying {}
A postcard of a harbour with {} in large letters
A brass plaque on an old door engraved with {}
A theatre marquee at night announcing {}
A paper lunch bag on a kitchen table, labelled {}
A sandy beach with {} drawn in the wet sand
A food truck in a park with {} painted on its side
A glass jar on a shelf with a label that says {}
A robot in a workshop holding up a card that reads {}
A snowy mountain hut with {} carved over its entrance
A museum ticket on a marble counter, printed with {}
A newspaper on a park bench with the headline {}
A hot air balloon over green hills with {} on its envelope
A fox in a raincoat holding an umbrella printed with {}
A train carriage at a station with {} written along its side
A shop window with {} in gold lettering
A cardboard box on a doorstep stamped with {}
A space station corridor with a lit panel reading {}
A watercolour painting of a lighthouse with {} lettered below it
A school blackboard with {} written in chalk
A stadium scoreboard that shows {}
A delivery bicycle with a basket that says {}
A cat lying on a doormat that reads {}
A spray of fireworks over a river spelling {}
A stitched patch on a denim jacket that says {}
A pixel art title screen of a game called {}
A bakery display with a small flag that says {}
A tattered flag on a sailing ship bearing {}
A laptop on a train table showing {} in plain letters
""".strip().splitlines()

_WORDS = """
amber anchor apple arrow autumn bakery balance bamboo basket beacon berry bicycle blossom border breeze bridge brother
bubble butter button cactus camera candle canyon carpet castle cedar cherry circle citrus clever cloud clover coast
coffee comet copper coral cotton cousin crystal curtain daisy dance dawn delta desert diamond dolphin dragon dream
eagle early echo eleven ember engine evening explore fabric falcon family feather festival fiction finish flame flower
forest fortune fountain freedom fresh friend frozen future galaxy garden gentle ginger glacier golden gravity guitar
hammer happy harbour harvest hazel helium hello hidden history holiday honey horizon humble hundred iceberg imagine
indigo insect island ivory jacket jasmine jigsaw journey jungle justice kettle kitchen kitten ladder lagoon lantern
laundry lavender legend lemon letter library linen lively lobster lucky lunar magic magnet mango maple marble market
meadow melody mercury midnight mineral mirror mocha moment monday morning mountain museum mustard nature needle
neighbour nickel noodle number nutmeg oasis ocean octopus olive onion opal orbit orchard origin oxygen oyster paddle
palace panda paper parade parcel pepper piano picnic pigeon pilot pioneer planet plaza pocket poetry polar pottery
prairie pretzel promise puzzle quartz quiet rabbit radio rainbow raven recipe remember ribbon river rocket saffron
sailor salmon sandal school season secret shadow shelter signal silence silver simple sister sketch smile soccer solar
sparrow spiral spring square station stellar storm story summer sunday sunrise sunset swallow teapot temple theatre
thirty thunder ticket timber tomato travel treasure tropic tulip tunnel turtle twelve twilight umbrella unicorn valley
vanilla velvet vessel victory village vintage violet voyage walnut warmth water wander weekend welcome whisper willow
window winter wisdom wonder wooden yellow yogurt zebra zenith zephyr
"""

_PHRASES = """
open late, open daily, closed today, fresh bread, hot soup, cold drinks, good news, good morning, slow down, mind the
gap, keep left, keep out, wet paint, no parking, one way, dead end, push here, pull gently, last train, next stop,
lost luggage, city lights, country roads, deep blue, high tide, low battery, full moon, first snow, second chance,
third floor, free coffee, iced tea, apple pie, pancake house, pizza palace, burger bar, noodle shop, corner store,
book club, reading room, quiet please, music hall, jazz night, film week, art fair, flea market, garden party, summer
sale, winter games, spring clean, autumn leaves, happy birthday, best friends, thank you, see you soon, come back
home, be kind, stay curious, dream big, work hard, have fun, take it easy, never give up, do not enter, out of order,
handle with care, this side up, made by hand, made with love, open all night, back in ten minutes, please ring the
bell, please knock, beware of the dog, the cat is in, follow the river, over the hills, under the stars, beyond the
sea, across the bridge, behind the curtain, north star, south pole, east gate, west wing, platform nine, gate twelve,
room seven, number one, double trouble, triple scoop, half price, two for one, buy local, eat your greens, drink
water, plant a tree, save the bees, mend the roof, paint the town, ride a bike, catch the wave, climb higher, run
faster, sleep well, wake up early, sing along, dance all day, write it down, read between lines, think again, start
here, finish line, winner takes all, ready set go, game over, level two, press start, new record, high score, home
team, lucky charm, secret recipe, family dinner, sunday roast, tuesday tacos, friday fish, pick your own, farm shop,
honey for sale, fresh eggs, village fete, lost and found, tools for hire, keys cut here, shoes repaired, bikes for
rent, tickets sold out, standing room only, all aboard, mission control, moon base, mars or bust, time machine, robot
repair, dragon crossing, wizard school, pirate radio, treasure map, ghost train, haunted house, magic lantern, silver
spoon, golden hour, purple rain boots, green light, red carpet, black forest cake, white noise, blue monday, orange
grove
"""

_CASES: tuple[Callable[[str], str], ...] = (str.upper, str.title, str.lower, str.capitalize)


def text_rendering(split: str) -> list[Record]:
    """Words and phrases to write, of one to four words: some 2 500 train prompts, 300 held out, mixed well.

    What is held out is the text, one in five: none of them stands in a train prompt, alone or among other words. Each
    is asked for in several of the scenes, in capitals or not; only the text is in double quotes.

    Args:
        split: `train` or `held-out`.

    Raises:
        MarbleError: another split.
    """
    if split not in SCENES_A_TEXT:
        raise MarbleError(f'prompt source "text-rendering": the split must be train or held-out, got "{split}"')
    scenes = [f" {scene.lower()} ".replace(",", "") for scene in _SCENES]
    known = {*_WORDS.split(), *" ".join(_PHRASES.split()).split(", ")}
    texts = sorted((text for text in known if not _stands_in(text, scenes)), key=_number)
    held_out = texts[: len(texts) // _HELD_OUT]
    if split == "held-out":
        chosen = held_out
    else:
        chosen = [text for text in texts if not any(_stands_in(each, [f" {text} "]) for each in held_out)]
    records = [_record(scene, text) for text in chosen for scene in _scenes_for(text, SCENES_A_TEXT[split])]
    return sorted(records, key=lambda record: _number(record.text))


def _stands_in(text: str, others: list[str]) -> bool:
    return any(f" {text} " in other for other in others)


def _scenes_for(text: str, count: int) -> list[str]:
    return sorted(_SCENES, key=lambda scene: _number(scene, text))[:count]


def _record(scene: str, text: str) -> Record:
    written = _CASES[_number("case", scene, text) % len(_CASES)](text)
    return Record(scene.format(f'"{written}"'), "text-rendering", {"text": written})


def _number(*what: str) -> int:
    """A number that depends on `what` alone, on every machine."""
    return int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:8], "big")
