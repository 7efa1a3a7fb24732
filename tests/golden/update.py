"""Regenerate the golden files: `python -m tests.golden.update`.

`structure.json` is not among them, for it states what programs depend on; `--structure` writes it, too, when a field,
a command or a topic is added on purpose.
"""

import sys

from tests.golden import contract


def main() -> None:
    files = contract.golden_files()
    if "--structure" in sys.argv[1:]:
        files[contract.STRUCTURE] = contract.render_structure(contract.structure())
    for name, text in files.items():
        path = contract.FOLDER / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            sys.stdout.write(f"{path.relative_to(contract.FOLDER.parent.parent)}\n")


if __name__ == "__main__":
    main()
