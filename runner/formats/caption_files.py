"""Endings of files with captions; pure."""

from __future__ import annotations

# Of the caption of one medium, in order of preference.
CAPTION_ENDINGS = (".txt", ".caption")
# Of lists of media and captions.
LIST_ENDINGS = (".jsonl", ".json", ".csv")
# Which of these are used is decided where captions are matched.
TEXT_ENDINGS = (*CAPTION_ENDINGS, *LIST_ENDINGS)
