"""Makes the README's picture of `redrafter demo`, docs/images/demo.svg, from a real run on this machine.

    python recipes/demo/picture.py [OUTPUT]

Take it on an idle machine: the picture shows the times of the run.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.text import Text

COMMAND = ["redrafter", "demo", "--max-new-tokens", "64"]
PROMPTS = [
    "Please find me a hotel in New York with a good rating.",
    "I am looking for a two bedroom apartment in San Jose.",
    "Write a Java method that returns the sum of an array.",
]
"""Three of the built-in prompts, so that the picture stays small."""
WIDTH = 96


def picture() -> str:
    """The SVG of a terminal that shows the command and what it prints."""
    words = [*COMMAND, *(word for prompt in PROMPTS for word in ("--prompt", prompt))]
    environment = os.environ | {"FORCE_COLOR": "1", "COLUMNS": str(WIDTH)}
    output = subprocess.run(words, env=environment, stdout=subprocess.PIPE, check=True, text=True).stdout
    console = Console(record=True, width=WIDTH, file=StringIO())
    console.print(Text("$ " + " ".join(COMMAND) + " --prompt … --prompt … --prompt …", style="bold"))
    console.print(Text.from_ansi(output))
    svg = console.export_svg(title="redrafter demo")
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)  # no fonts from other hosts


def main(output: str = "docs/images/demo.svg") -> None:
    """Writes the picture."""
    Path(output).write_text(picture())


if __name__ == "__main__":
    main(*sys.argv[1:])
