"""Which encoding texts are in, decided from all of them."""

from __future__ import annotations

import codecs

import pytest

from runner.formats.text_encoding import decode_texts

TEXTS = {
    "cp1252": ["un garçon près de la fenêtre", "a woman’s red dress", "ein schöner Hund"],  # noqa: RUF001
    "cp1250": ["zażółć gęślą jaźń", "kobieta w czerwonej sukience, łąka"],
    "cp1251": ["кошка сидит на окне", "a photo of ohwx, женщина в красном платье"],
    "koi8-r": ["кошка сидит на окне", "женщина в красном платье, Москва"],
    "cp1253": ["μια γάτα κάθεται στο παράθυρο"],
    "cp1254": ["kırmızı elbiseli bir kadın, köpek çayırda koşuyor"],  # noqa: RUF001
    "cp932": ["赤い服を着た女性が椅子に座っている", "ohwx ネコ, 1girl", "猫"],
    "euc_jp": ["赤い服を着た女性が椅子に座っている", "窓の外を見る猫"],
    "cp936": ["一个穿红色裙子的女人坐在椅子上", "一只狗在草地上奔跑", "猫"],
    "cp950": ["一個穿紅色裙子的女人坐在椅子上", "貓", "城市夜景"],
    "cp949": ["빨간 옷을 입은 여자가 의자에 앉아 있다", "고양이 한 마리"],
}


def _stored(texts: list[str], encoding: str) -> dict[str, bytes]:
    return {f"{n}.txt": text.encode(encoding) for n, text in enumerate(texts)}


# Texts of one encoding are read as they were written, whatever it is, and it is said that the
# encoding was guessed. (The cat in cp936 is valid UTF-8, and means something else there.)
@pytest.mark.parametrize("encoding", sorted(TEXTS))
def test_an_encoding_is_decided_for_all_texts(encoding: str) -> None:
    decoded = decode_texts(_stored(TEXTS[encoding], encoding), None)
    assert decoded.texts == {f"{n}.txt": text for n, text in enumerate(TEXTS[encoding])}
    assert set(decoded.encodings.values()) == {encoding}
    assert decoded.guessed == set(decoded.encodings)
    assert not decoded.undecided and not decoded.damaged


# A text that says too little by itself is read as the others of its dataset.
def test_a_short_text_follows_the_others() -> None:
    alone = {"a.txt": "É um gato".encode("cp1252")}
    assert decode_texts(alone, None).undecided == ("a.txt",)
    others = _stored(["um cão em São Paulo", "o gato não está aqui"], "cp1252")
    assert decode_texts(alone | others, None).texts["a.txt"] == "É um gato"


# UTF-8 needs no decision, and marks say what a text is; the mark is no part of it.
def test_marks_and_utf8_leave_no_doubt() -> None:
    stored = {
        "plain": "été".encode(),
        "utf-8": "\ufeffété".encode(),
        "utf-16": "été".encode("utf-16"),
        "big": codecs.BOM_UTF16_BE + "été".encode("utf-16-be"),
        "utf-32": "été".encode("utf-32"),
    }
    decoded = decode_texts(stored, None)
    assert dict.fromkeys(stored, "été") == decoded.texts
    assert decoded.encodings == {"utf-16": "utf-16", "big": "utf-16", "utf-32": "utf-32"}
    assert not decoded.guessed


# Texts of two encodings, noise, and UTF-16 without a mark are not guessed at: all are named.
@pytest.mark.parametrize(
    "stored",
    [
        {"a": "кошка сидит на окне".encode("cp1251"), "b": "赤い服を着た女性".encode("cp932")},
        {"a": bytes(range(128, 256)), "b": bytes(range(254, 127, -1))},
        {"a": "a cat".encode("utf-16-le"), "b": "a dog".encode("utf-16-le")},
    ],
)
def test_what_can_not_be_decided_is_named(stored: dict[str, bytes]) -> None:
    decoded = decode_texts({**stored, "fine": b"a bird"}, None)
    assert decoded.undecided == ("a", "b")


# A stated encoding is taken instead of a guess; what is UTF-8 stays so, what does not fit is named.
def test_a_stated_encoding_is_taken() -> None:
    stored = {"a": "été".encode("mac_roman"), "b": "été".encode(), "c": b"plain"}
    decoded = decode_texts(stored, "mac_roman")
    assert decoded.texts == {"a": "été", "b": "été", "c": "plain"}
    assert decoded.encodings == {"a": "mac_roman"} and not decoded.guessed
    assert decode_texts({"a": b"caf\xe9"}, "utf-8").damaged == ("a",)
    assert decode_texts({"a": "a cat".encode("utf-16-le")}, "utf-16-le").texts == {"a": "a cat"}
    assert decode_texts({"a": "a cat".encode("utf-16-le")}, "cp1252").damaged == ("a",)
