"""Decide in which encoding the file names of an archive were written; pure.

Archives made by older Windows programs hold names in the code page of the computer that packed them
and do not say which. One code page is chosen for all names of an archive together: that in which
they need the fewest bits, given how often its letters are used in its languages. The bits are rough
estimates of -log2 of a character's frequency; that of a legal but rare character is large, so that
text in the wrong code page, which is mostly rare characters and mixed scripts, loses by far.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise

_ASCII = 5.0
_RARE = 20.0
# For a character of another script right beside a small Latin letter.
_MIXED = 5.0

# Frequent in texts and in names of files.
_JAPANESE = (
    "一二三上下中大小人年月日時分新旧前後左右赤青白黒金木水火土山川海空花犬猫写真画像動表情背景"
    "顔女男子的名本東京全部屋夜朝夏冬春秋雨雪風車道学生"
)
_CHINESE = (
    "的一是不了在人有我他这中大来上个国到说们为子和你地出道也时年得就那要下以生会自着去之过家学"
    "对可她里后小么心多天而能好都然没日于起还发成事只作当想看文无开手十用主行方又如前所本见经头"
    "面公同三已老从动两长知民样现分将外但身些与高意进把法此实回二理美点月明其种声全工己话儿者向"
    "情部正名定女问力机给等几很业最间新什打便位因重被走电四第门相次东政海口使教西再平真听世气信"
    "北少关并内加化由却代军产入先山五太水万市眼体别处总才场师书比住员九笑性通目华报立马命张活难"
    "神数件安表原车白应路期叫死常提感金何更反合放做系计或司利受光王果亲界及今京务制解各任至清物"
    "台象记边共风战干接它许八特觉望直服毛林题建南度统色字请交爱让认算论百吃义科怎元社术结六功指"
    "思非流每青管夫连远资队跟带花快条院变联权往展该领传近留红治决周保达办运武半候七必城父强步完"
    "革深区即求品士转量空甚众技轻程告江语英基派满式李息写呢识极令黄德收脸钱党倒未持取设始版双历"
    "越史商千片容研像找友孩站广改议形委早房音火际则首单据导影失拿网香似斯专石若兵弟谁校读志飞观"
    "争究包组造落视济喜离虽坏照图截屏幕微副夹频猫狗汉舞剑男龙凤虎兔狐鸟鱼熊"
)
_TAIWANESE = (
    "的一是不了在人有我他這中大來上個國到說們為子和你地出道也時年得就那要下以生會自著去之過家學"
    "對可她里後小麼心多天而能好都然沒日於起還發成事只作當想看文無開手十用主行方又如前所本見經頭"
    "面公同三已老從動兩長知樣現分將外但身些與高意進把法此實回二理美點月明其種聲全工己話兒者向情"
    "部正名定女問力機給等幾很業最間新什打便位因重被走電四第門相次東政海口使教西再平真聽世氣信北"
    "少關並內加化由卻代照圖截螢幕副檔資料夾影片貓狗花山水"
)
_KOREAN = (
    "이다는에의가을를은로고하지서한기어사도자인리나아그시대일있해것부수장보전정들만스상게주원여"
    "내비조소신라면과세제와구미공우동안거데요오물생화성모마발실문년중관유적었했으경국계무연위영"
    "말반선양진방법당용분속체교려간바학식행개람새폴더림파복본캡처강"
)

_LATIN = {
    **dict.fromkeys("äöüßéèêëàâáãåçñíîïóôõúûøæýœ", 6.0),
    **dict.fromkeys("ąćęłńśźżčďěňřšťůžğışőűășțđÄÖÜÉÀÅÇÑØ", 8.0),
    **dict.fromkeys("ĄĆĘŁŃŚŹŻČĎĚŇŘŠŤŮŽĞŞİŐŰĂȘȚĐÈÊËÂÁÃÍÎÏÓÔÕÚÛÆÝŒìòùÌÒÙ", 10.0),
    **dict.fromkeys("’‘“”„–—…«»°©®™·º¿¡", 11.0),
}
_CYRILLIC = {
    **dict.fromkeys("оеаинтсрвлкмдпуяыьгзбчйхжшюцщэфъёіїєў", 5.5),
    **dict.fromkeys("АБВГДЕЖЗИЙКЛМНОПРСТУФХЦЧШЩЪЫЬЭЮЯЁІЇЄЎ", 7.0),
    **dict.fromkeys("№«»–—…", 11.0),
}
_PUNCTUATION = dict.fromkeys("、。，！？：；（）【】「」『』《》〈〉～〜・ー　々＿－…—“”", 9.0)


def _single(letters: dict[str, float]) -> Callable[[str], float]:
    return lambda character: letters.get(character, 16.0)


def _japanese(character: str) -> float:
    if "\u3041" <= character <= "\u30fe":
        return 6.5
    if character in _FREQUENT["cp932"]:
        return 8.5
    lead = _lead(character, "cp932")
    if character >= "\uff61":  # half-width
        return 9.0 if character <= "\uff9f" else _RARE
    if "\u4e00" <= character <= "\u9fff":
        return 12.0 if lead < 0x98 else 17.0
    return _RARE


def _chinese(character: str) -> float:
    if character in _FREQUENT["cp936"]:
        return 9.0
    if not "\u4e00" <= character <= "\u9fff":
        return _RARE
    lead, trail = character.encode("cp936")
    if trail < 0xA1 or not 0xB0 <= lead <= 0xF7:
        return _RARE
    return 12.0 if lead <= 0xD7 else 17.0


def _taiwanese(character: str) -> float:
    if character in _FREQUENT["cp950"]:
        return 9.0
    if not "\u4e00" <= character <= "\u9fff":
        return _RARE
    return 12.5 if 0xA4 <= _lead(character, "cp950") <= 0xC6 else 18.0


def _korean(character: str) -> float:
    if character in _FREQUENT["cp949"]:
        return 7.5
    if "\uac00" <= character <= "\ud7a3":
        return 11.3 if character.encode("cp949")[1] >= 0xA1 else _RARE
    return 18.0 if "\u4e00" <= character <= "\u9fff" else _RARE


def _unicode(character: str) -> float:
    """Return the bits in UTF-8, which any script may be written in."""
    if any(first <= character <= last for first, last in _SCRIPTS):
        return 8.0
    return 11.0 if "\u3400" <= character <= "\ud7a3" else 1.5 * _RARE


def _lead(character: str, encoding: str) -> int:
    return character.encode(encoding)[0]


_FREQUENT = {
    "cp932": frozenset(_JAPANESE),
    "cp936": frozenset(_CHINESE),
    "cp950": frozenset(_TAIWANESE),
    "cp949": frozenset(_KOREAN),
}
# The first where two cost the same: cp437 is what the format asks for.
_CODE_PAGES: dict[str, Callable[[str], float]] = {
    "utf-8": _unicode,
    "cp437": _single(_LATIN),
    "cp932": _japanese,
    "cp936": _chinese,
    "cp950": _taiwanese,
    "cp949": _korean,
    "cp1252": _single(_LATIN),
    "cp850": _single(_LATIN),
    "cp866": _single(_CYRILLIC),
    "cp1251": _single(_CYRILLIC),
    "cp1250": _single(_LATIN),
    "cp852": _single(_LATIN),
}
# Latin, Greek, Cyrillic, Hebrew, Arabic; accents that macOS writes apart; India and Thailand;
# punctuation and symbols; kana; full-width forms; emoji.
_SCRIPTS = (
    *(("\u00a0", "\u017f"), ("\u0386", "\u045f"), ("\u05d0", "\u06cc"), ("\u0300", "\u0328")),
    *(("\u0900", "\u0e5b"), ("\u1e00", "\u1eff"), ("\u2010", "\u2044"), ("\u20ac", "\u2764")),
    *(("\u3000", "\u30ff"), ("\uff00", "\uffef"), ("\U0001f300", "\U0001faff")),
)
_LATIN_PAGES = frozenset({"cp437", "cp1252", "cp850", "cp1250", "cp852"})
LANGUAGES = {
    "cp437": "Western, DOS",
    "cp850": "Western, DOS",
    "cp1252": "Western",
    "cp852": "Central European, DOS",
    "cp1250": "Central European",
    "cp866": "Cyrillic, DOS",
    "cp1251": "Cyrillic",
    "cp932": "Japanese",
    "cp936": "simplified Chinese",
    "cp950": "traditional Chinese",
    "cp949": "Korean",
}


def encoding_of(names: Iterable[bytes]) -> str:
    """Return the Python name of the encoding in which all these names were written.

    Every name can be decoded with what is returned, "utf-8" where all are ASCII.
    """
    written = sorted({name for name in names if not name.isascii()})
    # cp437 has a character for every byte, so there is always one.
    costs = {
        page: sum(map(_cost(page), decoded))
        for page in _CODE_PAGES
        if (decoded := _decoded(written, page)) is not None
    }
    return min(costs, key=costs.__getitem__)


def _decoded(names: Iterable[bytes], encoding: str) -> list[str] | None:
    try:
        return [name.decode(encoding) for name in names]
    except UnicodeDecodeError:
        return None


def _cost(page: str) -> Callable[[str], float]:
    bits, latin = _CODE_PAGES[page], page in _LATIN_PAGES

    def of(text: str) -> float:
        cost = sum(_bits(one, bits, latin) for one in text)
        if page == "utf-8":
            return cost
        return cost + sum(_beside(*pair, latin=latin) for pair in pairwise(text))

    return of


def _bits(character: str, bits: Callable[[str], float], latin: bool) -> float:
    if character < " ":
        return _RARE
    if character.isascii():
        return _ASCII
    if not latin and character in _PUNCTUATION:
        return _PUNCTUATION[character]
    return bits(character)


def _beside(left: str, right: str, *, latin: bool) -> float:
    """Return the bits for two characters that seldom stand beside each other."""
    if left.isascii() and right.isascii():
        return 0.0
    if left.islower() and right.isupper():
        return 6.0
    if latin:  # accented letters stand among others
        both = not left.isascii() and not right.isascii()
        alone = not (left if right.isascii() else right).isalpha()
        return 4.0 if both or alone else 0.0
    small = (left.isascii() and left.islower()) or (right.isascii() and right.islower())
    return _MIXED if small else 0.0
