"""How likely a text is as writing of a language, to tell encodings apart; pure.

The model is small: how often characters beyond ASCII follow letters, blanks and each other, and how
frequent each is in the languages of an encoding. Frequencies are rounded; only their order of
magnitude matters, since a wrong encoding is off by many orders.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

_RARE = 1e-7


@dataclass(frozen=True)
class Candidate:
    """An encoding, the script that is written in it, and the logarithm of how common it is."""

    codec: str
    script: str
    prior: float
    shown: str


CANDIDATES = (
    Candidate("cp1252", "latin", 0, "Western European"),
    Candidate("cp1250", "central", -4.5, "Central European"),
    Candidate("cp1254", "turkish", -4, "Turkish"),
    Candidate("mac_roman", "latin", -5, "Western European, old Macs"),
    Candidate("cp850", "latin", -5, "Western European, DOS"),
    Candidate("cp1251", "cyrillic", 0, "Cyrillic"),
    Candidate("koi8-r", "cyrillic", -1, "Russian"),
    Candidate("koi8-u", "cyrillic", -2, "Ukrainian"),
    Candidate("cp866", "cyrillic", -2, "Cyrillic, DOS"),
    Candidate("cp1253", "greek", -2, "Greek"),
    Candidate("cp1255", "hebrew", -2, "Hebrew"),
    Candidate("cp1256", "arabic", -2, "Arabic"),
    Candidate("cp874", "thai", -2, "Thai"),
    Candidate("cp932", "japanese", 0, "Japanese"),
    Candidate("euc_jp", "japanese", -2, "Japanese"),
    Candidate("cp936", "simplified", 0, "simplified Chinese"),
    Candidate("cp950", "traditional", 0, "traditional Chinese"),
    Candidate("cp949", "korean", 0, "Korean"),
)

# Which kind of character follows which: A letters and L letters beyond ASCII, S signs beyond it,
# and the other characters of ASCII, after a word of ASCII (O) or of L (P, also at the beginning).
# Other pairs say nothing about the encoding.
_FOLLOWS: Mapping[str, Mapping[str, float]] = {
    # Words of ASCII with a few accents.
    "latin": {
        "AL": 0.04, "AS": 0.01, "OL": 0.02, "OS": 0.01, "PL": 0.02, "PS": 0.02, "PA": 0.8,
        "LL": 0.02, "LS": 0.005, "LA": 0.75, "LP": 0.22,
        "SL": 0.02, "SS": 0.02, "SA": 0.45, "SP": 0.5,
    },
    # Words of ASCII with many.
    "accented": {
        "AL": 0.1, "AS": 0.005, "OL": 0.05, "OS": 0.01, "PL": 0.05, "PS": 0.02, "PA": 0.8,
        "LL": 0.12, "LS": 0.005, "LA": 0.65, "LP": 0.22,
        "SL": 0.02, "SS": 0.02, "SA": 0.45, "SP": 0.5,
    },
    # Words of letters beyond ASCII.
    "alphabet": {
        "AL": 0.002, "AS": 0.003, "OL": 0.05, "OS": 0.02, "PL": 0.5, "PS": 0.03, "PA": 0.05,
        "LL": 0.82, "LS": 0.005, "LA": 0.002, "LP": 0.17,
        "SL": 0.3, "SS": 0.1, "SA": 0.1, "SP": 0.5,
    },
    # Words without blanks between them.
    "ideographs": {
        "AL": 0.01, "AS": 0.01, "OL": 0.1, "OS": 0.02, "PL": 0.4, "PS": 0.05, "PA": 0.1,
        "LL": 0.8, "LS": 0.1, "LA": 0.01, "LP": 0.09,
        "SL": 0.7, "SS": 0.1, "SA": 0.05, "SP": 0.15,
    },
}  # fmt: skip

_CJK_SIGNS = dict.fromkeys("，。、！？：；“”（）「」・ー…《》", 0.07)  # noqa: RUF001
_SIGNS = {
    **dict.fromkeys("’“”–—…", 0.1),  # noqa: RUF001
    **dict.fromkeys("‘«»„°·•", 0.02),  # noqa: RUF001
}
# Others that people write; frames and controls are not.
_RARE_SIGNS = "²³½¼¾©®™€£¥¢§¡¿×÷ºª†‹›‚№"  # noqa: RUF001
_SIMPLIFIED = (
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里"
    "用道行所然家种事成方多经么去法学如都同现当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实"
    "日军者意无力它与长把机十民第公此已工使情明性知全三又关点正业外将两高间由问很最重并物手应战向头文体政"
    "美相见被利什二等产或新己身果加西月话合回特代内信表化老给世位次度门任常先海通教儿原东声提立及比员解水"
    "名真走各入几口条平气题活更别打女变四神总何电数安少报才结反受目太量再感建做接必场件计管期直德资命山金"
    "指统区保至队形社便空决马科书眼却界达光放像王象完设式色路南品住告类北边死张该万取拉格望术师观清今切让"
    "识候带男孩站坐穿衣裙帽黑红蓝绿黄紫粉背景照片图画镜微笑猫狗树花草街房桌椅窗车城市夜晚阳雪雨木短裤毛手"
)
_TRADITIONAL = (
    "的一是不了在人有我他這個們中來上大為和國地到以說時要就出會可也你對生能而子那得於著下自之年過發後作裡"
    "用道行所然家種事成方多經麼去法學如都同現當沒動面起看定天分還進好小部其些主樣理心她本前開但因只從想實"
    "日軍者意無力它與長把機十民第公此已工使情明性知全三又關點正業外將兩高間由問很最重並物手應戰向頭文體政"
    "美相見被利什二等產或新己身果加西月話合回特代內信表化老給世位次度門任常先海通教兒原東聲提立及比員解水"
    "名真走各入幾口條平氣題活更別打女變四神總何電數安少報才結反受目太量再感建做接必場件計管期直德資命山金"
    "指統區保至隊形社便空決馬科書眼卻界達光放像王象完設式色路南品住告類北邊死張該萬取拉格望術師觀清今切讓"
    "識候帶男孩站坐穿衣裙帽黑紅藍綠黃紫粉背景照片圖畫鏡微笑貓狗樹花草街房桌椅窗車城市夜晚陽雪雨木短褲毛手"
)
_KANJI = (
    "日一人国大年本中出来見上生分行会者前間子時事自手方思学社最場話所部作今高同女気家合体目男動言入小立開"
    "新後長地回先代力的下現性理実表定要度多対市当明画全東取空色白黒赤青緑黄髪服着座犬猫花木山海川道街車夜"
    "朝夕光影雨雪風景背写真像笑顔少屋外窓机椅子歩走持古石茶紙金銀水火土月星"
)
_HANGUL = (
    "이다는의에을고가하를지한도사서기은로자어인아나리들시그대스여있해수정일전라보부게장과상만제조니주으구오면와"
    "원요적위신마성소비공관동모할것안경생우무문선민세유미되었였습까져진치트드레크르연방말음식물입명빛색남녀얼굴머"
    "옷배앉검흰빨간파란초록노양개꽃늘거창책탁"
)
_CYRILLIC = dict(
    zip(
        "оеаинтсрвлкмдпуяыьгзбчйхжшюцщэфъёіїєґ",
        (0.11, 0.085, 0.08, 0.074, 0.067, 0.063, 0.055, 0.047, 0.045, 0.044, 0.035, 0.032, 0.03,
         0.028, 0.026, 0.02, 0.019, 0.017, 0.017, 0.016, 0.016, 0.0145, 0.012, 0.0097, 0.0094,
         0.007, 0.006, 0.005, 0.004, 0.003, 0.003, 0.0004, 0.0008, 0.015, 0.002, 0.0015, 0.0005),
        strict=True,
    )
)  # fmt: skip
_GREEK = {
    **dict.fromkeys("αοιετσνηυρπκμλ", 0.06),
    **dict.fromkeys("ςωγδθχάέίόήύ", 0.018),
    **dict.fromkeys("φβξζψώ", 0.005),
}
_LATIN = {
    **dict.fromkeys("éäöü", 0.1),
    **dict.fromkeys("èàçáíóñßêåøã", 0.03),
    **dict.fromkeys("úôîâëïûùæõœìòý", 0.008),
    **dict.fromkeys("ÿðþ", 0.0003),
}
_CENTRAL = {
    **dict.fromkeys("ąęłóśżáéíčěřšžýůüöőń", 0.035),
    **dict.fromkeys("ćźďňťúäôľĺŕăâîşţđűß", 0.01),
}
_TURKISH = {**dict.fromkeys("ıüşçöğ", 0.12), "İ": 0.03, **dict.fromkeys("âîû", 0.005)}


def likelihood(text: str, candidate: Candidate) -> float:
    """Return the logarithm of a text's likelihood, without what is the same for all encodings."""
    frequency, follows = _MODELS[candidate.script]
    total = 0.0
    for pair, count in Counter(map("".join, pairwise(_kinds(text)))).items():
        if pair in follows:
            total += count * math.log(follows[pair])
    for character, count in Counter(text).items():
        if character.isascii():
            # As likely in all languages; counted because some encodings take it for half of one.
            total += count * math.log(1 / 30)
        else:
            total += count * math.log(max(frequency(character), _RARE))
    for before, after in pairwise(text):
        # No word goes on with a capital letter.
        if not after.isascii() and after.isupper() and before.islower():
            total += math.log(0.01)
        if not before.isascii() and before.isupper() and after.islower() and after.isascii():
            total += math.log(0.3)
    return total


def noise(contents: Iterable[bytes]) -> float:
    """Return the logarithm of the likelihood of the bytes as no writing at all."""
    total = -3.0
    for content in contents:
        high = [byte > 127 for byte in content]
        begins = sum(after and not before for before, after in pairwise([False, *high]))
        total += begins * math.log(0.05) + sum(high) * math.log(0.5 / 128)
        total += (len(content) - sum(high)) * math.log(1 / 30)
    return total


def _kinds(text: str) -> str:
    kinds = ["P"]
    for character in text:
        kind = _kind(character)
        kinds.append("O" if kind == "P" and kinds[-1] in "AO" else kind)
    return "".join([*kinds, "O" if kinds[-1] in "AO" else "P"])


@lru_cache(65536)
def _kind(character: str) -> str:
    if character.isascii():
        return "A" if character.isalpha() else "P"
    return "L" if unicodedata.category(character)[0] in "LM" else "S"


def _of_alphabet(letters: Mapping[str, float]) -> Callable[[str], float]:
    def frequency(character: str) -> float:
        if character in letters:
            return letters[character]
        if character.lower() in letters:
            return letters[character.lower()] * 0.06
        return _SIGNS.get(character, 0.0005 if character in _RARE_SIGNS else 0) * 0.3

    return frequency


def _of_script(name: str, letters: int) -> Callable[[str], float]:
    def frequency(character: str) -> float:
        if unicodedata.name(character, "").startswith(name):
            return 0.8 / letters
        return _SIGNS.get(character, 0) * 0.3

    return frequency


def _of_ideographs(
    common: str, codec: str, last_common_lead: int, others: Callable[[str], float | None]
) -> Callable[[str], float]:
    frequent = frozenset(common)

    def frequency(character: str) -> float:
        if character in frequent:
            return 0.5 / len(frequent)
        if character in _CJK_SIGNS:
            return _CJK_SIGNS[character]
        if (known := others(character)) is not None:
            return known
        try:
            lead = character.encode(codec)[0]
        except UnicodeEncodeError:
            return _RARE
        return 0.3 / 3500 if lead <= last_common_lead else 0.005 / 3500

    return frequency


def _kana(character: str) -> float | None:
    name = unicodedata.name(character, "")
    if name.startswith("HIRAGANA"):
        return 0.45 / 70
    if name.startswith("KATAKANA"):
        return 0.15 / 80
    if name.startswith("HALFWIDTH"):
        return 0.0002 / 60
    return None


def _no_ideograph(character: str) -> float | None:
    """Return how rare characters of other scripts are in Chinese."""
    name = unicodedata.name(character, "")
    return None if name.startswith("CJK UNIFIED") else 1e-5 * (name != "")


def _syllable(character: str) -> float | None:
    name = unicodedata.name(character, "")
    if name.startswith("HANGUL SYLLABLE"):
        # KS X 1001 has the 2,350 in use, in two bytes; the rest of cp949 are hardly written.
        return 0.3 / 2200 if len(character.encode("euc_kr")) == 2 else 0.0005 / 8800
    return 0.002 / 4888 if name.startswith("CJK") else 1e-5 * (name != "")


_MODELS: Mapping[str, tuple[Callable[[str], float], Mapping[str, float]]] = {
    "latin": (_of_alphabet(_LATIN), _FOLLOWS["latin"]),
    "central": (_of_alphabet(_CENTRAL), _FOLLOWS["accented"]),
    "turkish": (_of_alphabet(_TURKISH), _FOLLOWS["accented"]),
    "cyrillic": (_of_alphabet(_CYRILLIC), _FOLLOWS["alphabet"]),
    "greek": (_of_alphabet(_GREEK), _FOLLOWS["alphabet"]),
    "hebrew": (_of_script("HEBREW", 27), _FOLLOWS["alphabet"]),
    "arabic": (_of_script("ARABIC", 36), _FOLLOWS["alphabet"]),
    "thai": (_of_script("THAI", 70), _FOLLOWS["ideographs"]),
    "japanese": (_of_ideographs(_KANJI, "cp932", 0x97, _kana), _FOLLOWS["ideographs"]),
    "simplified": (
        _of_ideographs(_SIMPLIFIED, "gb2312", 0xD7, _no_ideograph),
        _FOLLOWS["ideographs"],
    ),
    "traditional": (
        _of_ideographs(_TRADITIONAL, "big5", 0xC6, _no_ideograph),
        _FOLLOWS["ideographs"],
    ),
    "korean": (_of_ideographs(_HANGUL, "euc_kr", 0xC8, _syllable), _FOLLOWS["ideographs"]),
}
