"""A filter for prompts that others wrote: sexual content, nudity, gore, and always whatever sexualises minors.

It looks for the words and phrases of a list, whole words alone, however they are spelt: in any case, with accents, with
digits for letters, with letters repeated or kept apart. A list is neither complete nor fair: it makes the worst rare,
and takes some harmless prompts with it. It knows English only.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from typing import Literal

Category = Literal["minors", "sexual", "nudity", "gore"]

_SEXUAL = """
ahegao anal anally anus arousing asshole bdsm bimbo boner bondage boob boobies boobs bukkake busty clit clitoris cock
cocks creampie cum cumming cums cumshot cunnilingus cunt cunts dick dicks dildo dildos doggystyle dominatrix ecchi
erection erections fap fellatio femdom fetish fetishes fingering foreplay fuck fucked fucker fucking fucks futa futanari
genital genitalia genitals gloryhole groping handjob hentai hooker hookers horny incest jizz kamasutra kinky labia lewd
lewds lingerie milf milfs necrophilia nipple nipples nsfw onlyfans orgies orgy panties panty penis penises pron
prostitute prostitutes pubes pubic pussies pussy rape raped rapes raping rapist rimjob rule34 scrotum seductive
seductively semen sensual sensually sex sexier sexiest sexting sexual sexually sexy slut sluts slutty smut softcore
strapon stripper strippers striptease testicle testicles thong threesome tits titties titty upskirt vagina vaginal
vaginas vibrator voluptuous voyeur vulva wank wanking whore whores xrated xxx yiff
"""
_SEXUAL_STEMS = """
bestial blowjob copulat deepthroat ejaculat erotic fornicat gangbang masturbat molest orgasm porn sexuali
"""
_SEXUAL_PHRASES = """
adult content|adult film|adult movie|barely legal|big ass|big booty|big butt|big breasts|bubble butt|camel toe|fat ass|
giant breasts|huge ass|huge breasts|large breasts|legs spread|nice ass|no bra|no panties|no underwear|
not safe for work|round ass|rule 34|see through|spread legs|thick ass|wet shirt|wet t shirt|x rated
"""
_NUDITY = """
areola areolas barebreasted bottomless breasts buttocks naked nakedness naturist naturists nood noods nude nudes nudism
nudist nudists nudity skinnydipping topless unclad unclothed undressed undressing
"""
_NUDITY_PHRASES = """
bare ass|bare bottom|bare breast|bare butt|bare chested woman|exposed breast|full frontal|no clothes|no clothing|
skinny dipping|taking off clothes|taking off her clothes|taking off his clothes|wearing nothing|without any clothes|
without clothes|without clothing
"""
_GORE = "bloodbath entrails gore gory guro viscera"
_GORE_STEMS = "behead decapitat disembowel dismember eviscerat mutilat"
_GORE_PHRASES = """
blood and guts|blood everywhere|blood soaked|blood splatter|blood splattered|bloody body|bloody corpse|brains out|
burned alive|covered in blood|cut in half body|dead bodies|dead body|dripping blood|exposed brain|exposed guts|
exposed organs|intestines spilling|pool of blood|ripped apart|severed arm|severed finger|severed fingers|severed hand|
severed head|severed heads|severed leg|severed limb|severed limbs|skinned alive|slit throat|snuff film
"""
_MINORS = """
adolescent adolescents babies baby boy boys child childlike children granddaughter grandson highschool infant infants
juvenile kid kids kindergarten kindergartener lolita lolitas minor minors newborn preschool preschooler preteen preteens
schoolboy schoolboys schoolchild schoolchildren schoolgirl schoolgirls teen teenage teenaged teenager teenagers teens
toddler toddlers tween tweens underage underaged
"""
_MINORS_PHRASES = "elementary school|high school|middle school|primary school|little daughter|little sister"
_GIRLS = "girl girls"
_ALWAYS = "jailbait loli lolicon lolis paedophile paedophilia pedophile pedophilia shota shotacon shotas"
_BESIDE_MINORS = """
bikini bikinis bra bras cleavage provocative seduction skimpy suggestive sultry thighs underwear undies
"""
_HARMLESS = """
al gore|gore tex|gore vidal|lesley gore|chicken breasts|duck breasts|turkey breasts|cock of the rock|cock robin|
cum laude|dick and jane|dick cheney|dick clark|dick grayson|dick tracy|dick van dyke|dick whittington|harry and dick|
tom dick and harry|moby dick|philip k dick|bondage of|erection of|horny toad|horny toads|john lee hooker|kinky boots|
kinky curls|kinky hair|naked eye|naked mole rat|naked mole rats|naked neck|nude color|nude colour|nude colored|
nude coloured|nude heels|nude lipstick|nude tones|blue tits|coal tits|great tits|long tailed tits|marsh tits|
willow tits|oilseed rape|rape blossom|rape field|rape fields|rape flower|rape flowers|rape seed|opposite sex|same sex|
sex and the city|sex education|sex pistols|paint stripper|wire stripper|wire strippers|pussy cat|pussy cats|pussy riot|
pussy willow|pussy willows|see through car|see through glass|see through walls|see through water|see through window
"""
"""Left out before anything is looked for."""

_YOUNG = "one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen"
_AGE = re.compile(rf"\b(?:\d|1[0-7]|{_YOUNG}) ?(?:yo|y o|yrs? olds?|years? olds?|years? of age)\b")

_WORD = re.compile(r"[^\W_]+")
_JOINED = re.compile(r"[^\W_]+(?:[._*\-]+[^\W_]+)+")
_SPELT = re.compile(r"(?<![^\W_])[^\W_](?:[\W_]{1,3}[^\W_](?![^\W_])){2,}")
_SIGN = re.compile(r"(?<=[^\W\d_])[@$]+|[@$]+(?=[^\W\d_])")
_RUN = re.compile(r"(.)\1{2,}")
_DIGITS = (str.maketrans("013457", "oieast"), str.maketrans("013457", "oleast"))


class _Phrases:
    """Some phrases, looked for only where the first word of one is."""

    def __init__(self, phrases: str) -> None:
        parts = sorted({" ".join(part.split()) for part in phrases.split("|")}, key=len, reverse=True)
        self.firsts = frozenset(part.split()[0] for part in parts)
        self.pattern = re.compile(rf"\b(?:{'|'.join(parts)})\b")

    def occur(self, text: str) -> bool:
        """Whether any of them is in a text of words with single spaces."""
        return not self.firsts.isdisjoint(text.split()) and bool(self.pattern.search(text))

    def cut(self, text: str) -> str:
        """The text without them."""
        return self.pattern.sub(" ", text) if self.occur(text) else text


class _List:
    """What one category goes by."""

    def __init__(self, words: str, stems: str, phrases: str) -> None:
        self.words, self.stems, self.phrases = frozenset(words.split()), tuple(stems.split()), _Phrases(phrases)

    def matches(self, words: set[str], text: str) -> bool:
        """Whether it is in a text, given also as its words in all ways of reading them."""
        return (
            not self.words.isdisjoint(words)
            or any(word.startswith(self.stems) for word in words)
            or self.phrases.occur(text)
        )


_LISTS: dict[Category, _List] = {
    "sexual": _List(_SEXUAL, _SEXUAL_STEMS, _SEXUAL_PHRASES),
    "nudity": _List(_NUDITY, "barebreast", _NUDITY_PHRASES),
    "gore": _List(_GORE, _GORE_STEMS, _GORE_PHRASES),
}
_YOUNG_WORDS = frozenset((_MINORS + _GIRLS).split())
_YOUNG_PHRASES = _Phrases(_MINORS_PHRASES)
_ALWAYS_WORDS, _BESIDE_WORDS = frozenset(_ALWAYS.split()), frozenset(_BESIDE_MINORS.split())
_HARMLESS_PHRASES = _Phrases(_HARMLESS)


def unsafe(text: str) -> Category | None:
    """What speaks against a prompt, the gravest first, or None. It names the category, not the word.

    `minors` is a sexual or nude word beside one for a child, a girl, a boy or an age below 18.
    """
    plain = text.casefold()
    if not text.isascii():
        decomposed = unicodedata.normalize("NFKD", text)
        plain = "".join(c for c in decomposed if unicodedata.category(c) not in ("Mn", "Cf")).casefold()
    plain = _SIGN.sub(lambda found: found[0].replace("@", "a").replace("$", "s"), plain)
    spaced = _HARMLESS_PHRASES.cut(" ".join(_WORD.findall(plain)))
    words = {reading for word in (*spaced.split(), *_put_together(plain)) for reading in _readings(word)}
    found: Category | None = next((name for name, each in _LISTS.items() if each.matches(words, spaced)), None)
    if not _ALWAYS_WORDS.isdisjoint(words):
        return "minors"
    if found in ("sexual", "nudity") or not _BESIDE_WORDS.isdisjoint(words):
        young = not _YOUNG_WORDS.isdisjoint(words) or _YOUNG_PHRASES.occur(spaced) or _AGE.search(spaced)
        return "minors" if young else found
    return found


def _put_together(plain: str) -> Iterator[str]:
    """Words whose letters are kept apart: `n.u.d.e`, `n u d e`, `nu-de`."""
    for joined in _JOINED.findall(plain):
        yield "".join(_WORD.findall(joined))
    for spelt in _SPELT.findall(plain):
        letters = "".join(_WORD.findall(spelt))
        yield letters
        yield letters[1:]  # the first may be an article


def _readings(word: str) -> Iterator[str]:
    """A word as it is, with digits as letters or left out, and with its repeated letters once or twice."""
    ways = {word}
    if not word.isalpha() and not word.isdigit():
        ways |= {word.strip("0123456789"), *(word.translate(table) for table in _DIGITS)}
    for way in ways:
        yield way
        if _RUN.search(way):
            yield _RUN.sub(r"\1", way)
            yield _RUN.sub(r"\1\1", way)
