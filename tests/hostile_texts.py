"""Texts that a person may type and a program in between may read as something else."""

from __future__ import annotations

import random

# What Hydra, OmegaConf, YAML or a shell would read as something else.
HOSTILE = [
    *("2025_11_25", "007", "1_000", "5e10123", "1e3", "0x1f", "0b1", "1.50", "+1", "-0", "inf"),
    *("nan", "true", "False", "on", "None", "~", "Null", "null ", "choice(a)", "str(007)", "it's"),
    *("foo bar", "a: b", "${x}", "\\${x}", "${", "\\", "\\'", '\\"', "'", '"', "[", "]", "{", "}"),
    *(
        "(",
        ")",
        "=",
        ":",
        "#",
        "@",
        "!",
        "&",
        "*",
        "%",
        "`",
        "|",
        " ",
        "\t",
        "\n",
        "é",
        "日本",
        ",b",
    ),
]


def texts(count: int) -> list[str]:
    """Hostile texts and what chance makes of them, without those that mean something to Hydra."""
    chance = random.Random(15)
    made = ["".join(chance.choices(HOSTILE, k=chance.randint(2, 5))) for _ in range(count)]
    return [t for t in (*HOSTILE, *made) if t.strip()[:1] not in "'\"" or t[-1] not in "'\" \t\n"]
