"""Gives the workers a text: python new_task.py A text with some dots..."""

from __future__ import annotations

import sys

from worker import pgq, work

text = " ".join(sys.argv[1:]) or "Hello World!"
with pgq.begin() as connection:
    work.enqueue(connection, text=text)
print(f" [x] Sent {text}")
